"""The networks of the paper (sections 4 and 5.1). They need torch alone."""

from covidmtl_core.models.covid_mtl import CovidMTL, transfer_severity
from covidmtl_core.models.decovnet import DeCoVNet, decovnet
from covidmtl_core.models.inference import for_inference
from covidmtl_core.models.resnet3d import ResNet3D, resnet3d34
from covidmtl_core.models.squeezenet3d import SqueezeNet3D, shiftnet3d, squeezenet3d

__all__ = [
    "CovidMTL",
    "DeCoVNet",
    "ResNet3D",
    "SqueezeNet3D",
    "decovnet",
    "for_inference",
    "resnet3d34",
    "shiftnet3d",
    "squeezenet3d",
    "transfer_severity",
]
