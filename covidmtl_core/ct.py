"""Reading any chest CT in Hounsfield units, resampling it, and the paper's own volume format."""

import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from covidmtl_core import dicom
from covidmtl_core.dicom_files import is_deflated, is_dicom
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.volume_files import MAX_VOXELS, SUFFIXES, checked_path, known_suffix, read_file

AIR = -1024
"""HU that stands for no tissue: the least a CT number can be, and the padding of `read_ct`."""

MIN_SLICES = 10

_INTERPOLATORS = {
    "nearest": sitk.sitkNearestNeighbor,
    "linear": sitk.sitkLinear,
    "cubic": sitk.sitkBSpline,
}
_PNG = b"\x89PNG\r\n\x1a\n"


def read_ct(path: str | os.PathLike[str], series: str | int | None = None) -> sitk.Image:
    """Read a chest CT in Hounsfield units.

    Values below -1024 HU (padding outside the field of view, at -2000 or -3024 in many scanners)
    become -1024; nothing else is changed. What a `DataWarning` tells was put right; what cannot be
    read with certainty raises.

    Args:
        path: A folder or zip archive with a DICOM series, a NIfTI, NRRD or MetaImage file (.nii,
            .nii.gz, .nrrd, .mha) with its voxels in itself, or a volume in the released format.
        series: Which DICOM series to take, by UID, number or description; None takes the one with
            the most slices (see `dicom.read_series`).

    Returns:
        3D image, int16 (float32 if the file holds fractions), HU, in the file's own grid.

    Raises:
        DataError: The file is missing, damaged, or not a chest CT in HU; the message names it.
        ParameterError: `series` is not among the series found.
    """
    path = checked_path(path)
    try:
        if not path.exists():
            raise DataError(f"{path} does not exist: check the path.")
        kind = _kind(path)
        if kind == "series":
            return _checked(dicom.read_series(path, series), path)
        if series is not None:
            raise ParameterError(f"series {series!r} was given, but {path} is a single file.")
        return _checked(read_volume(path) if kind == "volume" else read_file(path), path)
    except PermissionError as error:
        raise DataError(f"{path} cannot be opened: permit reading it.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or 'damaged'}).") from error
    except MemoryError as error:
        raise DataError(f"{path} is too large for the memory of this computer.") from error


def _kind(path: Path) -> Literal["series", "volume", "file"]:
    if path.is_dir():
        return "series"
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder: give one of these.")
    with path.open("rb") as stream:
        start = stream.read(4)
    if not start:
        raise DataError(f"{path} is empty: copy or fetch it again.")
    if start == b"PK\x03\x04" or path.suffix.lower() == ".zip":
        return "series"
    if is_dicom(path):
        if _holds_png(path):
            return "volume"
        raise DataError(f"{path} is one DICOM file; give the folder with all slices of its series.")
    if known_suffix(path) is None:
        raise DataError(
            f"{path} is of no known type: give a folder or zip archive of DICOM slices, or a file "
            f"named {', '.join(SUFFIXES)}."
        )
    return "file"


def _by(values: Any) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


def _checked(image: sitk.Image, path: Path) -> sitk.Image:
    """The image in HU, or why it is no chest CT in HU."""
    spacing, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    extent = spacing * size
    if not np.isfinite(extent).all() or spacing.min() < 0.1 or spacing.max() > 15:
        raise DataError(
            f"{path} has voxels of {_by(spacing)} mm; a chest CT has 0.1 to 15 mm. Its header is "
            "wrong; convert it again from the original."
        )
    slices = size[2] if _is_axial(image) else size.min()
    if slices < MIN_SLICES or extent.min() < 50 or extent.max() > 2500:
        raise DataError(
            f"{path} covers {_by(extent)} mm in {size[2]} slices; at least {MIN_SLICES} slices and "
            "50 mm (at most 2,500 mm) in each direction are needed."
        )
    direction = np.array(image.GetDirection()).reshape(3, 3)
    crooked = np.abs(direction.T @ direction - np.eye(3)).max()
    if not (np.abs(image.GetOrigin()).max() < 1e5 and crooked < 2e-3):
        raise DataError(
            f"{path} has an impossible place or orientation; convert it again from the original."
        )
    values = sitk.GetArrayViewFromImage(image)
    _check_hu(values, path)
    kept = np.maximum(values, AIR)
    if not np.issubdtype(kept.dtype, np.integer) and not np.array_equal(kept.round(), kept):
        return _like(kept.astype(np.float32), image)
    return _like(kept.astype(np.int16), image)


def _check_hu(values: NDArray[Any], path: Path) -> None:
    """Raise unless there is air or lung, and tissue; padding tells nothing and is left out."""
    least, most = float(values.min()), float(values.max())
    extent = f"{path} holds values from {least:.0f} to {most:.0f}"
    if not np.isfinite([least, most]).all():
        raise DataError(f"{path} holds values that are no numbers (NaN or infinite).")
    if least >= 0 and most <= 255:
        raise DataError(f"{extent}, an 8-bit picture; CT numbers in HU are needed.")
    if most > 32_767:
        raise DataError(f"{extent}; in HU nothing is above 32,767: convert it again.")
    image = values > least
    air = (values >= -1100) & (values <= -700) & image
    enough = np.count_nonzero(air) >= 0.01 * np.count_nonzero(image)
    if most <= 0 or not enough or _is_too_low(values):
        advice = (
            "If 1024 was added, read it with SimpleITK and pass it through ct.from_paper"
            if least >= 0
            else "Convert it again from the original"
        )
        raise DataError(
            f"{extent}; in HU a chest has air from -1100 to -700 and tissue above 0. {advice}."
        )


def _is_too_low(values: NDArray[Any]) -> bool:
    """Does much lie below air? Padding has one or two values, numbers that are not HU have many."""
    low = values[values < -1200]
    if low.size < 0.25 * values.size:
        return False
    counts = np.sort(np.unique(low, return_counts=True)[1])
    return bool(counts[:-2].sum() >= 0.25 * values.size)


def _is_axial(image: sitk.Image) -> bool:
    return abs(image.GetDirection()[8]) > 0.7


def _like(voxels: NDArray[Any], image: sitk.Image) -> sitk.Image:
    made = sitk.GetImageFromArray(voxels)
    made.CopyInformation(image)
    return made


def resample(
    image: sitk.Image,
    spacing_mm: float | tuple[float, float, float],
    interpolation: Literal["nearest", "linear", "cubic"] = "cubic",
) -> sitk.Image:
    """Resample to another voxel spacing; the outer faces of the volume stay where they are.

    Args:
        image: Any 3D image.
        spacing_mm: One spacing, or (x, y, z).
        interpolation: `cubic` (B-spline, the paper's choice) cannot leave the range of the image's
            values here; `nearest` for label masks.

    Returns:
        An image of the same pixel type.

    Raises:
        ParameterError: The spacing or the interpolation cannot be used.
    """
    if not isinstance(interpolation, str) or interpolation not in _INTERPOLATORS:
        raise ParameterError(
            f"interpolation is {interpolation!r}; it must be one of {', '.join(_INTERPOLATORS)}."
        )
    check_image(image)
    try:
        target = np.broadcast_to(np.asarray(spacing_mm, float), 3)
    except (TypeError, ValueError):
        raise ParameterError(f"spacing is {spacing_mm!r}; give one number or three.") from None
    old, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    if not np.isfinite(target).all() or target.min() <= 0:
        raise ParameterError(f"spacing is {spacing_mm} mm; it must be above 0.")
    new_size = np.maximum(1, np.round(size * old / target))
    if new_size.prod() > MAX_VOXELS:
        raise ParameterError(f"spacing {spacing_mm} mm gives {_by(new_size)} voxels: too many.")
    new = size * old / new_size
    corner = image.TransformContinuousIndexToPhysicalPoint(tuple(new / old / 2 - 0.5))
    pixel = image.GetPixelID()
    whole = interpolation != "nearest" and pixel not in (sitk.sitkFloat32, sitk.sitkFloat64)
    done = sitk.Resample(
        sitk.Cast(image, _float_for(pixel)) if whole else image,
        [int(n) for n in new_size],
        sitk.Transform(),
        _INTERPOLATORS[interpolation],
        corner,
        tuple(new),
        image.GetDirection(),
        0,
    )
    if interpolation == "cubic":
        values = sitk.GetArrayViewFromImage(image)
        done = sitk.Clamp(done, done.GetPixelID(), float(values.min()), float(values.max()))
    # Casting alone would cut off fractions and so darken the image by half a HU.
    return sitk.Cast(sitk.Round(done), pixel) if whole else done


def check_image(image: sitk.Image, name: str = "image") -> None:
    """Refuse what is not a 3D image with one real number a voxel.

    Raises:
        ParameterError: It is not; the message has the name.
    """
    if not isinstance(image, sitk.Image):
        what = f"is a {type(image).__name__}, not a SimpleITK image"
        raise ParameterError(f"The {name} {what}; a 3D image is needed.")
    kind = image.GetPixelIDTypeAsString()
    if image.GetDimension() != 3 or " of " in kind:  # labels, vectors, complex numbers
        raise ParameterError(
            f"The {name} has {image.GetDimension()} dimensions of type '{kind}'; a 3D image with "
            "one number a voxel is needed."
        )


def _float_for(pixel: int) -> int:
    """A type of fractions that keeps whole numbers of a type exactly."""
    small = (sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkUInt16, sitk.sitkInt16)
    return sitk.sitkFloat32 if pixel in small else sitk.sitkFloat64


def same_grid(one: sitk.Image, other: sitk.Image) -> bool:
    """Do two images have the same size, spacing, origin and direction?"""
    return one.GetSize() == other.GetSize() and all(
        np.allclose(getattr(one, get)(), getattr(other, get)(), atol=1e-3)
        for get in ("GetSpacing", "GetOrigin", "GetDirection")
    )


def to_paper(image: sitk.Image) -> sitk.Image:
    """HU to the paper's intensities: HU + 1024, clipped to 0..4095 (section 4.1 as released)."""
    values = sitk.GetArrayViewFromImage(image).astype(np.float32)
    return _like(np.clip(values.round() + 1024, 0, 4095).astype(np.int16), image)


def from_paper(image: sitk.Image) -> sitk.Image:
    """The paper's intensities (HU + 1024) to HU; the inverse of `to_paper` up to its clipping."""
    return _like(np.rint(sitk.GetArrayViewFromImage(image)).astype(np.int32) - 1024, image)


# --- the released volume format ----------------------------------------------------------------


def write_volume(image: sitk.Image, path: str | os.PathLike[str]) -> None:
    """Write a volume in the released format: 16-bit PNGs of HU + 1024 in one DICOM-like file.

    Args:
        image: HU; whole numbers from -1024 to 64,511 (outside the lungs the paper has -1024). Of a
            left-handed grid the slices are kept in reverse, for the format knows only others.
        path: The file to write, in one step.

    Raises:
        ParameterError: The image is not 3D or a value cannot be kept in 16 bits.
    """
    check_image(image)
    path = checked_path(path)
    if np.linalg.det(np.array(image.GetDirection()).reshape(3, 3)) < 0:
        image = image[:, :, ::-1]
    values = sitk.GetArrayViewFromImage(image)
    fits = -1024 <= float(values.min()) <= float(values.max()) <= 64_511
    stored = values.astype(np.int32) + 1024 if fits else np.zeros(0)
    if not fits or not np.array_equal(stored - 1024, values):
        raise ParameterError(
            f"values from {values.min()} to {values.max()} cannot be kept: whole HU from -1024 to "
            "64,511 are needed."
        )
    frames = []
    for plane in stored.astype(np.uint16):
        buffer = io.BytesIO()
        Image.fromarray(plane).save(buffer, format="PNG")
        frames.append(buffer.getvalue())
    spacing, direction = image.GetSpacing(), image.GetDirection()
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = "CT"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.RescaleIntercept, dataset.RescaleSlope = -1024, 1
    dataset.PixelSpacing = dicom.decimals([spacing[1], spacing[0]])
    dataset.SpacingBetweenSlices = dicom.decimals([spacing[2]])[0]
    dataset.ImagePositionPatient = dicom.decimals(image.GetOrigin())
    dataset.ImageOrientationPatient = dicom.decimals([*direction[0::3], *direction[1::3]])
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
        part = Path(folder) / path.name
        dataset.save_as(part, enforce_file_format=True)
        part.replace(path)


def read_volume(path: str | os.PathLike[str]) -> sitk.Image:
    """Read a volume in the released format.

    Args:
        path: A DICOM-like file with one 16-bit PNG a slice.

    Returns:
        int16 (int32 if a value needs it), HU; outside the lungs -1024. Spacing is 1 mm where the
        file does not say.

    Raises:
        DataError: The file is damaged or of another kind.
    """
    path = checked_path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_deflated(path):
                raise _NotWhole("it is packed as a whole (deflated)")
            dataset = pydicom.dcmread(path, force=True)
            frames = _frames(dataset)
            volume = np.stack([_decode(frame) for frame in frames]).astype(np.int32) - 1024
            image = sitk.GetImageFromArray(
                volume.astype(np.int16) if volume.max() <= 32_767 else volume
            )
            _set_geometry(image, dataset)
    except OSError as error:
        if error.errno:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        raise DataError(f"{path} has damaged slices: copy or fetch it again.") from error
    except _NotWhole as error:
        raise DataError(
            f"{path} is not a whole volume in the released format ({error}): copy it again."
        ) from error
    except Exception as error:
        # pydicom and Pillow raise anything on a damaged file.
        raise DataError(
            f"{path} is not a whole volume in the released format: copy it again."
        ) from error
    return image


class _NotWhole(Exception):
    """What is wrong with a volume in the released format."""


def _frames(dataset: pydicom.Dataset) -> list[bytes]:
    """The PNGs, when they are of one size that agrees with the header."""
    for keyword, expected in {"RescaleIntercept": -1024, "RescaleSlope": 1}.items():
        value = dataset.get(keyword)
        if value is not None and float(value) != expected:
            raise _NotWhole(f"its {keyword} is {value}, not {expected}")
    declared = dataset.get("NumberOfFrames")
    frames = list(generate_frames(dataset.PixelData, number_of_frames=int(declared or 0) or None))
    if not frames or (declared is not None and len(frames) != int(declared)):
        raise _NotWhole(f"it has {len(frames)} slices instead of {declared}")
    sizes = set()
    for frame in frames:
        with Image.open(io.BytesIO(frame), formats=["PNG"]) as picture:
            if not picture.mode.startswith("I"):
                raise _NotWhole("a slice is not a picture of 16 bits")
            sizes.add(picture.size)
    columns, rows = sizes.pop()
    if sizes:
        raise _NotWhole("its slices differ in size")
    if dataset.get("Rows", rows) != rows or dataset.get("Columns", columns) != columns:
        raise _NotWhole("its slices are not of the size its header says")
    if rows * columns * len(frames) > MAX_VOXELS:
        raise _NotWhole(f"it has {rows * columns * len(frames):,} voxels")
    return frames


def _decode(frame: bytes) -> NDArray[np.uint16]:
    with Image.open(io.BytesIO(frame), formats=["PNG"]) as picture:
        # Decoding alone does not look at the checksums.
        picture.verify()
    with Image.open(io.BytesIO(frame), formats=["PNG"]) as picture:
        return np.array(picture, dtype=np.uint16)


def _set_geometry(image: sitk.Image, dataset: pydicom.Dataset) -> None:
    """Spacing and place where the file says them."""
    if "PixelSpacing" in dataset:
        rows, columns = (float(part) for part in dataset.PixelSpacing)
        between = dataset.get("SpacingBetweenSlices") or dataset.get("SliceThickness") or 1
        spacing = (columns, rows, float(between))
        if not np.isfinite(spacing).all() or min(spacing) <= 0:
            raise _NotWhole("its voxel size is impossible")
        image.SetSpacing(spacing)
    if "ImagePositionPatient" in dataset and "ImageOrientationPatient" in dataset:
        origin = [float(part) for part in dataset.ImagePositionPatient]
        axes = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
        right = np.abs(axes @ axes.T - np.eye(2)).max() < 1e-3
        if not right or not np.isfinite(origin).all() or np.abs(origin).max() > 1e5:
            raise _NotWhole("its place or orientation is impossible")
        image.SetOrigin(origin)
        image.SetDirection(tuple(np.vstack([axes, np.cross(*axes)]).T.ravel()))


def _holds_png(path: Path) -> bool:
    """Does a DICOM-like file hold PNGs? They start within the first fragments."""
    with path.open("rb") as stream:
        return _PNG in stream.read(2**16)
