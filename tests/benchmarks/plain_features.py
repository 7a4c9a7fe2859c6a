"""The released extraction: pyradiomics over the whole masked volume, the wavelets twice.

The reference that `extract_features` must equal, and the baseline of its speed.
"""

import numpy as np
import pandas as pd
import SimpleITK as sitk
from radiomics.featureextractor import RadiomicsFeatureExtractor

from covidmtl_core.radiomics.names import FEATURE_NAMES, WAVELET_GLCM


def as_released(image: sitk.Image, mask: sitk.Image) -> pd.Series:
    """Three runs: the image, then each wavelet family alone; names as in the released table."""
    values = (sitk.GetArrayFromImage(image) + np.int16(1024)) * (sitk.GetArrayFromImage(mask) > 0)
    volume = sitk.GetImageFromArray(values.astype(np.int16))
    inside = sitk.Cast(volume > 0, sitk.sitkUInt8)
    found: dict[str, float] = {}
    for families in (("firstorder", "glcm", "glrlm", "glszm"), ("glcm",), ("glrlm",)):
        extractor = RadiomicsFeatureExtractor(binWidth=25)
        if len(families) == 1:
            extractor.disableAllImageTypes()
            extractor.enableImageTypeByName("Wavelet", customArgs={"wavelet": "coif1"})
        extractor.disableAllFeatures()
        wanted = list(WAVELET_GLCM) if families == ("glcm",) else []
        extractor.enableFeaturesByName(**dict.fromkeys(families, wanted))
        for name, value in extractor.execute(volume, inside).items():
            if "diagnostics" not in name:
                kind, family, feature = name.split("_")
                band = "" if kind == "original" else f"{kind.removeprefix('wavelet-')}_{family}_"
                found[band + feature] = float(value)
    return pd.Series(found)[list(FEATURE_NAMES)]
