"""Names of the released features, in the order of the released table (paper section 4.1).

The authors dropped pyradiomics' class prefixes on the original image. Three names that GLRLM and
GLSZM share therefore occur once: 18 + 24 + 16 + 16 - 3 + 8 * (22 + 16) = 375.
"""

FIRST_ORDER = (
    "10Percentile",
    "90Percentile",
    "Energy",
    "Entropy",
    "InterquartileRange",
    "Kurtosis",
    "Maximum",
    "MeanAbsoluteDeviation",
    "Mean",
    "Median",
    "Minimum",
    "Range",
    "RobustMeanAbsoluteDeviation",
    "RootMeanSquared",
    "Skewness",
    "TotalEnergy",
    "Uniformity",
    "Variance",
)

GLCM = (
    "Autocorrelation",
    "ClusterProminence",
    "ClusterShade",
    "ClusterTendency",
    "Contrast",
    "Correlation",
    "DifferenceAverage",
    "DifferenceEntropy",
    "DifferenceVariance",
    "Id",
    "Idm",
    "Idmn",
    "Idn",
    "Imc1",
    "Imc2",
    "InverseVariance",
    "JointAverage",
    "JointEnergy",
    "JointEntropy",
    "MCC",
    "MaximumProbability",
    "SumAverage",
    "SumEntropy",
    "SumSquares",
)

GLRLM = (
    "GrayLevelNonUniformity",
    "GrayLevelNonUniformityNormalized",
    "GrayLevelVariance",
    "HighGrayLevelRunEmphasis",
    "LongRunEmphasis",
    "LongRunHighGrayLevelEmphasis",
    "LongRunLowGrayLevelEmphasis",
    "LowGrayLevelRunEmphasis",
    "RunEntropy",
    "RunLengthNonUniformity",
    "RunLengthNonUniformityNormalized",
    "RunPercentage",
    "RunVariance",
    "ShortRunEmphasis",
    "ShortRunHighGrayLevelEmphasis",
    "ShortRunLowGrayLevelEmphasis",
)

GLSZM = (
    "GrayLevelNonUniformity",
    "GrayLevelNonUniformityNormalized",
    "GrayLevelVariance",
    "HighGrayLevelZoneEmphasis",
    "LargeAreaEmphasis",
    "LargeAreaHighGrayLevelEmphasis",
    "LargeAreaLowGrayLevelEmphasis",
    "LowGrayLevelZoneEmphasis",
    "SizeZoneNonUniformity",
    "SizeZoneNonUniformityNormalized",
    "SmallAreaEmphasis",
    "SmallAreaHighGrayLevelEmphasis",
    "SmallAreaLowGrayLevelEmphasis",
    "ZoneEntropy",
    "ZonePercentage",
    "ZoneVariance",
)

WAVELET_GLCM = (
    "Autocorrelation",
    "JointAverage",
    "ClusterProminence",
    "ClusterShade",
    "ClusterTendency",
    "Contrast",
    "Correlation",
    "DifferenceAverage",
    "DifferenceEntropy",
    "DifferenceVariance",
    "JointEnergy",
    "JointEntropy",
    "Imc1",
    "Imc2",
    "Idm",
    "Idmn",
    "Id",
    "Idn",
    "InverseVariance",
    "MaximumProbability",
    "SumEntropy",
    "SumSquares",
)

SUB_BANDS = ("LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH", "LLL")

FEATURE_NAMES: tuple[str, ...] = (
    *dict.fromkeys((*FIRST_ORDER, *GLCM, *GLRLM, *GLSZM)),
    *(f"{band}_glcm_{name}" for band in SUB_BANDS for name in WAVELET_GLCM),
    *(f"{band}_glrlm_{name}" for band in SUB_BANDS for name in GLRLM),
)
"""The 375 columns of the released table."""

TABLE_5_FEATURES: tuple[str, ...] = (
    "HLL_glcm_ClusterProminence",
    "LHL_glcm_Idmn",
    "Maximum",
    "Energy",
    "LLL_glcm_Imc1",
    "HLL_glcm_Correlation",
    "LLH_glcm_Correlation",
    "LHH_glcm_ClusterShade",
    "HLH_glrlm_LongRunLowGrayLevelEmphasis",
    "HLH_glcm_ClusterShade",
    "Idn",
    "LLH_glcm_ClusterShade",
    "LargeAreaHighGrayLevelEmphasis",
    "LHH_glrlm_ShortRunHighGrayLevelEmphasis",
    "Idmn",
    "GrayLevelVariance",
    "HHH_glcm_ClusterShade",
    "LLL_glcm_Imc2",
    "LLL_glrlm_RunEntropy",
    "LLH_glcm_ClusterProminence",
    "HLL_glcm_DifferenceVariance",
    "Imc2",
    "LLL_glcm_Correlation",
    "Imc1",
)
"""The 24 features of Table 5: the columns of the authors' `topfeatures.xlsx`, in its order."""

FIGURE_8_FEATURES: tuple[str, ...] = (
    "Imc1",
    "HLL_glcm_DifferenceVariance",
    "HLH_glcm_ClusterShade",
    "LHH_glcm_ClusterShade",
    "LLL_glcm_Imc1",
)
"""The features that section 6 names as different between the two cases of Fig. 8."""
