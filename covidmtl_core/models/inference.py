"""Networks made over so that they predict faster."""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from covidmtl_core.models.layers import ConvNorm, check_volume
from covidmtl_core.models.squeezenet3d import Fire, Trunk

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_convolution_pointwise_"
)


def for_inference(model: nn.Module) -> nn.Module:
    """A copy of a network that predicts faster: norms folded into convolutions, channels last.

    Its outputs equal those of `model.eval()` but for rounding. It cannot be trained, nor its
    weights loaded elsewhere; `torch.compile` makes it faster still.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvNorm):
            folded = fuse_conv_bn_eval(module.conv, module.norm)  # type: ignore[arg-type]
            module.conv = FoldedConv(folded, isinstance(module.relu, nn.ReLU))  # type: ignore[assignment]
            module.norm = module.relu = nn.Identity()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Trunk):
                setattr(module, name, FoldedTrunk(child))
    return model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


class FoldedConv(nn.Module):
    """A convolution, an addition and a ReLU that oneDNN does at once, where it can.

    PyTorch itself keeps single samples with few values from oneDNN, for a path half as fast.

    Args:
        conv: The convolution.
        relu: With the ReLU?
    """

    def __init__(self, conv: nn.Conv3d, relu: bool) -> None:
        super().__init__()
        self.conv, self.out_channels, self.relu = conv, conv.out_channels, relu

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """The convolution of `x`, added to `onto`, which may be overwritten."""
        conv = self.conv
        geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        onednn = _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == conv.weight.dtype
        if not (onednn and x.dtype == torch.float32):
            y = conv(x)
        elif onto is None:
            then = "relu" if self.relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(
                x, conv.weight, conv.bias, *geometry, then, [], ""
            )
        elif torch.compiler.is_compiling():  # which knows no other form of it
            y = torch.ops.mkldnn._convolution_pointwise(
                x, conv.weight, conv.bias, *geometry, "none", [], ""
            )
        else:
            unary = "relu" if self.relu else None
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                onto, x, conv.weight, conv.bias, *geometry, "add", None, unary, [], ""
            )
        y = y if onto is None else y + onto
        return F.relu(y) if self.relu else y


class FoldedFire(nn.Module):
    """A Fire module whose two kinds of maps are never joined.

    Args:
        fire: With folded convolutions.
        widths: Maps in each part that comes in.
    """

    def __init__(self, fire: Fire, widths: list[int]) -> None:
        super().__init__()
        squeeze: nn.Conv3d = fire.squeeze.conv.conv  # type: ignore[assignment]
        self.bypass = fire.bypass
        self.squeeze = nn.ModuleList()
        for number, weight in enumerate(squeeze.weight.split(widths, 1), start=1):
            part = nn.Conv3d(weight.shape[1], weight.shape[0], 1, bias=number == 1)
            part.weight = nn.Parameter(weight, requires_grad=False)
            if number == 1:
                part.bias = squeeze.bias
            self.squeeze.append(FoldedConv(part, relu=number == len(widths)))
        self.expand = nn.ModuleList()
        for expand in (fire.expand1, fire.expand3):
            self.expand.append(FoldedConv(expand.conv.conv, relu=True))  # type: ignore[arg-type]
        self.widths = [expand.out_channels for expand in (fire.expand1.conv, fire.expand3.conv)]

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        """(N, C, D, H, W) each."""
        squeezed = None
        for conv, part in zip(self.squeeze, parts, strict=True):
            squeezed = conv(part, squeezed)
        onto = parts if self.bypass else [None, None]
        return [conv(squeezed, to) for conv, to in zip(self.expand, onto, strict=True)]


class FoldedTrunk(nn.Module):
    """A trunk whose Fire modules pass on their maps in two parts.

    Args:
        trunk: With folded convolutions.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.channels, self.stem, self.layers = trunk.channels, trunk.stem, nn.ModuleList()
        widths = [trunk.stem.conv.conv.out_channels]
        layer: nn.Module
        for layer in itertools.chain.from_iterable(trunk.stages):  # type: ignore[arg-type]
            if isinstance(layer, Fire):
                layer = FoldedFire(layer, widths)
                widths = layer.widths
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        """As `Trunk`."""
        check_volume(x, self.channels)
        parts = [self.stem(x)]
        for layer in self.layers:
            parts = layer(parts) if isinstance(layer, FoldedFire) else [layer(p) for p in parts]
        return torch.cat(parts, 1)
