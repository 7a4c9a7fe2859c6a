"""The errors of the package. Each says what is wrong with which file or value, and what to do."""


class CovidMTLError(Exception):
    """Base of every error this package raises on purpose."""


class DataError(CovidMTLError):
    """A data file is missing, damaged or not what its name says."""


class DataWarning(UserWarning):
    """A file was read after something in it had to be put right."""


class DownloadError(DataError):
    """A data file is not at hand and could not be downloaded."""


class ParameterError(CovidMTLError, ValueError):
    """A value given by the caller cannot be used."""


class ClaimError(CovidMTLError):
    """A claims file or a recorded result breaks the rules of the claims file."""


class TrainingError(CovidMTLError):
    """A training cannot go on: memory ran out, or a loss is no longer a number."""


class MissingDependencyError(CovidMTLError, ImportError):
    """An optional package is needed for this call and is not installed."""
