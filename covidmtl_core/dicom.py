"""DICOM series: which files make a volume, in which order, with which geometry.

Geometry comes from ImagePositionPatient and ImageOrientationPatient alone; file names, instance
numbers and UIDs are only used to tell series apart. What might be a lost slice is never left aside
in silence: a file that cannot be read, or that belongs to the chosen series and does not fit, is an
error.
"""

import os
import re
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RawDataStorage,
    generate_uid,
)

from covidmtl_core.errors import DataError, DataWarning, ParameterError
from covidmtl_core.volume_files import MAX_VOXELS, shown

MAX_ARCHIVE_BYTES = 2 * 2**30
"""An archive that unpacks to more is refused."""

MAX_GAP_MM = 10.0
"""Widest gap between unevenly spaced slices that is filled by interpolation."""

_MAX_FILES = 20_000
_MAX_MEMBER_BYTES = 64 * 2**20
_MAX_TILT = 35.0
_SAME_PLACE_MM = 0.1
_CUT_MM = 10.0
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
"""Transfer syntaxes with uncompressed pixels."""
_COMPRESSED = tuple(
    f"1.2.840.10008.1.2.{end}"
    for end in ("4.51", "4.57", "4.70", "4.80", "4.81", "4.90", "4.91", "5")
)
_NO_IMAGES = (MediaStorageDirectoryStorage, RawDataStorage)
_KEY_TAGS = [
    "PatientID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "ConvolutionKernel",
]
_TAGS = [
    *_KEY_TAGS,
    "SOPClassUID",
    "ImageType",
    "Modality",
    "SliceThickness",
    "AcquisitionNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ModalityLUTSequence",
    "RescaleSlope",
    "RescaleIntercept",
]


@dataclass(frozen=True)
class _Pixels:
    """How and where a file keeps its pixels."""

    offset: int
    """Where uncompressed pixels start; -1 if they are compressed."""
    order: str
    bits: int
    signed: bool
    slope: float
    intercept: float


@dataclass(frozen=True)
class _Slice:
    path: Path
    name: str
    series: tuple[Any, ...]
    """UID, number and description, then all else that must agree within a series."""
    acquisition: str
    position: NDArray[np.float64]
    axes: NDArray[np.float64]
    """Rows: the directions along a row, along a column, and across slices."""
    spacing: tuple[float, float]
    """Between columns, between rows."""
    shape: tuple[int, int]
    pixels: _Pixels


class _NoSlice(Exception):
    """Why a file is no slice of a CT volume.

    Attributes:
        aside: It is an image of its own kind, rightly left aside.
        uid: Its SeriesInstanceUID; None if the file cannot be read at all.
    """

    def __init__(self, reason: str, uid: str | None = None, aside: bool = False):
        super().__init__(reason)
        self.uid, self.aside = uid, aside


class _NoDicom(Exception):
    """Why a file is not DICOM."""


def read_series(path: Path, series: str | int | None = None) -> sitk.Image:
    """Assemble the CT volume of a folder (searched with its subfolders) or zip archive.

    Of several series of one patient the one with the most slices is taken; among equals the thinner
    slices, then the lower series number. Localizers, reformats in other planes and files that are
    not DICOM are left aside. Unevenly spaced slices are interpolated to a regular grid where no gap
    exceeds `MAX_GAP_MM`, and a tilted gantry's sheared volume is resampled upright; both give a
    `DataWarning`.

    Args:
        path: A folder, or a zip archive of one.
        series: The series to take: its SeriesInstanceUID, SeriesNumber or SeriesDescription.

    Returns:
        Rescaled intensities; slices in ascending order along their normal.

    Raises:
        DataError: No series can be read with certainty; the message names the file or series.
        ParameterError: `series` matches none or several.
    """
    if series is not None and (isinstance(series, bool) or not isinstance(series, str | int)):
        raise ParameterError(
            f"series {series!r} of {path} is no UID, number or description: give one of these."
        )
    with _files(path) as files:
        slices = _choose(files, series, path)
        slices.sort(key=_height)
        voxels = len(slices) * slices[0].shape[0] * slices[0].shape[1]
        if voxels > MAX_VOXELS:
            raise DataError(f"{path} has a series of {voxels:,} voxels, too many for one CT scan.")
        pool = ThreadPoolExecutor(4)
        try:
            pixels = list(pool.map(lambda piece: _values(piece, path), slices))
        finally:
            pool.shutdown(cancel_futures=True)
    return _assemble(*_without_duplicates(slices, pixels, path), path)


def write_series(image: sitk.Image, folder: Path, patient_id: str = "phantom") -> None:
    """Write a volume as a DICOM CT series, one uncompressed file a slice.

    Args:
        image: Whole numbers from -32768 to 32767, HU.
        folder: Made if it is not there; files are named by their UIDs, so their order is not that
            of the slices.
        patient_id: Goes into PatientID and PatientName.

    Raises:
        ParameterError: The image is not 3D or its values cannot be kept.
    """
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ParameterError(f"the image has {image.GetDimension()} dimensions; 3 are needed.")
    voxels = sitk.GetArrayViewFromImage(image)
    with np.errstate(invalid="ignore"):
        stored = voxels.astype(np.int16)
    if not np.array_equal(stored, voxels):
        raise ParameterError(
            f"values from {voxels.min()} to {voxels.max()} cannot be kept: whole HU from -32768 to "
            "32767 are needed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    spacing, direction = image.GetSpacing(), image.GetDirection()
    common = {
        "SOPClassUID": CTImageStorage,
        "Modality": "CT",
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL"],
        "PatientID": patient_id,
        "PatientName": patient_id,
        "StudyInstanceUID": generate_uid(entropy_srcs=[patient_id, "study"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[patient_id, "series"]),
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[patient_id, "frame"]),
        "SeriesNumber": 1,
        "SeriesDescription": "Synthetic thorax",
        "ImageOrientationPatient": decimals([*direction[0::3], *direction[1::3]]),
        "PixelSpacing": decimals([spacing[1], spacing[0]]),
        "SliceThickness": decimals([spacing[2]])[0],
        "Rows": voxels.shape[1],
        "Columns": voxels.shape[2],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
    }
    for index, plane in enumerate(stored):
        uid = generate_uid(entropy_srcs=[patient_id, str(index)])
        dataset = pydicom.Dataset()
        for keyword, value in common.items():
            setattr(dataset, keyword, value)
        dataset.SOPInstanceUID = uid
        dataset.InstanceNumber = index + 1
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        dataset.ImagePositionPatient = decimals(position)
        dataset.PixelData = np.ascontiguousarray(plane, "<i2").tobytes()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(folder / f"{uid}.dcm", enforce_file_format=True)


def is_dicom(path: Path) -> bool:
    """Does a file start as a DICOM file does?"""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def is_deflated(path: Path) -> bool:
    """Is a whole DICOM file packed? Unpacking it has no bound, so it is refused."""
    return read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian


def decimals(values: Sequence[float]) -> list[str]:
    """Numbers as DICOM decimal strings, at most 16 characters."""
    return [pydicom.valuerep.format_number_as_ds(float(value)) for value in values]


# --- finding the files -----------------------------------------------------------------------


@contextmanager
def _files(path: Path) -> Iterator[list[tuple[Path, str]]]:
    """The files to look at and their names in the folder or archive."""
    if path.is_dir():
        yield _walk(path)
        return
    with tempfile.TemporaryDirectory(prefix="covidmtl-") as scratch:
        try:
            with zipfile.ZipFile(path) as archive:
                files = _extract(archive, Path(scratch), path)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{path} is not a zip archive that can be read (damaged, cut off or of another "
                "kind): copy or fetch it again."
            ) from error
        yield files


def _walk(path: Path) -> list[tuple[Path, str]]:
    """Files of a folder and its subfolders; links are followed, each folder is entered once."""

    def fail(error: OSError) -> None:
        raise DataError(f"{shown(str(error.filename))} cannot be opened: permit reading it.")

    found: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()
    for folder, inside, names in os.walk(path, onerror=fail, followlinks=True):
        mark = Path(folder).stat()
        if (mark.st_dev, mark.st_ino) in seen:
            inside.clear()
            continue
        seen.add((mark.st_dev, mark.st_ino))
        inside[:] = sorted(name for name in inside if name != "__MACOSX")
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith("._") and name != "DICOMDIR" and not _is_special(file):
                found.append((file, shown(str(file.relative_to(path)))))
        if len(found) > _MAX_FILES or len(seen) > _MAX_FILES:
            raise DataError(f"{path} holds over {_MAX_FILES:,} files; give one patient's folder.")
    return found


def _is_special(file: Path) -> bool:
    """Is it a pipe, a device or the like?"""
    try:
        return not stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return False


def _extract(archive: zipfile.ZipFile, target: Path, path: Path) -> list[tuple[Path, str]]:
    members = []
    for member in archive.infolist():
        parts = member.filename.replace("\\", "/").split("/")
        if not (member.is_dir() or "__MACOSX" in parts or parts[-1].startswith("._")):
            _check_member(member, path)
            members.append(member)
    size = sum(member.file_size for member in members)
    bomb = size > max(100 * path.stat().st_size, 2**20)
    if len(members) > _MAX_FILES or size > MAX_ARCHIVE_BYTES or bomb:
        raise DataError(
            f"{path} would unpack to {len(members):,} files of {size / 2**30:.1f} GiB; more than "
            f"{_MAX_FILES:,} files, {MAX_ARCHIVE_BYTES / 2**30:.0f} GiB or 100 times the archive "
            "is refused. Unpack it yourself and give the folder."
        )
    files = []
    for number, member in enumerate(members):
        file = target / f"{number:05d}{Path(member.filename).suffix[:8]}"
        # zipfile stops at the size the directory declares, so the sum above is a true bound.
        with archive.open(member) as source, file.open("wb") as copy:
            while part := source.read(2**20):
                copy.write(part)
        if Path(member.filename).name != "DICOMDIR":
            files.append((file, shown(member.filename)))
    return files


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    name = member.filename.replace("\\", "/")
    if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
        reason = "which leads outside the archive: refused"
    elif stat.S_ISLNK(member.external_attr >> 16):
        reason = "a link: refused; pack the files themselves"
    elif member.flag_bits & 1:
        reason = "which is locked with a password: unpack it yourself and give the folder"
    elif member.file_size > _MAX_MEMBER_BYTES:
        reason = f"of {member.file_size / 2**20:,.0f} MiB, too large for one CT slice: take it out"
    else:
        return
    raise DataError(f"{path} holds {shown(member.filename)!r}, {reason}.")


# --- reading the headers ---------------------------------------------------------------------


def _header(file: Path, name: str) -> _Slice:
    """The slice a file holds; raises why it holds none."""
    try:
        if not is_dicom(file):
            raise _NoDicom("is no DICOM file (damaged, or cut off)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_deflated(file):
                raise _NoSlice("is a packed (deflated) DICOM file; export it without that")
            with file.open("rb") as stream:
                dataset = pydicom.dcmread(
                    stream, stop_before_pixels=True, specific_tags=list(_TAGS)
                )
                return _slice(file, name, dataset, stream)
    except (_NoSlice, _NoDicom):
        raise
    except PermissionError:
        raise _NoSlice("cannot be opened: permit reading it") from None
    except FileNotFoundError:
        raise _NoDicom("is a link to a file that is not there") from None
    except Exception:
        # pydicom raises anything on a damaged header, RecursionError included.
        raise _NoSlice("has a damaged DICOM header") from None


def _slice(file: Path, name: str, dataset: pydicom.Dataset, stream: BinaryIO) -> _Slice:
    def text(keyword: str) -> str:
        value = dataset.get(keyword)
        return "" if value is None else str(value).strip()

    uid, modality = text("SeriesInstanceUID"), text("Modality")
    meta = dataset.file_meta.get("MediaStorageSOPClassUID")
    ends = not stream.read(1)
    if ends and ("SeriesInstanceUID" not in dataset or modality == "CT") and meta not in _NO_IMAGES:
        # A header that stops too early may have lost or shortened its UID.
        raise _NoSlice("is cut off within its header or has no pixels")
    stream.seek(-1 if not ends else 0, os.SEEK_CUR)
    if modality != "CT":
        if modality or meta in _NO_IMAGES:
            raise _NoSlice(f"has the modality {shown(modality) or '(none)'}, not CT", uid)
        raise _NoSlice("does not say its modality")
    try:
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise _NoSlice("is a multi-frame file; convert it to NIfTI (dcm2niix)", uid)
        position, axes, spacing, shape = _geometry(dataset, uid)
        if "LOCALIZER" in text("ImageType").upper():
            raise _NoSlice("is a localizer", uid, aside=abs(axes[2, 2]) < 0.7)
        if abs(axes[2, 2]) < 0.7:
            raise _NoSlice("is a reformat that is not axial", uid, aside=True)
        pixels = _pixel_layout(dataset, stream, file.stat().st_size, shape, uid)
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise _NoSlice("has a damaged DICOM header", uid) from None
    identity = [text(keyword) for keyword in _KEY_TAGS]
    thickness = text("SliceThickness")
    thick = round(_number(thickness), 3) if thickness else float("inf")
    return _Slice(
        path=file,
        name=name,
        series=(*identity[3:6], *identity[:3], identity[6], thick, shape),
        acquisition=text("AcquisitionNumber"),
        position=position,
        axes=axes,
        spacing=(float(spacing[1]), float(spacing[0])),
        shape=shape,
        pixels=pixels,
    )


def _geometry(
    dataset: pydicom.Dataset, uid: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], tuple[int, int]]:
    numbers = []
    localizer = "LOCALIZER" in str(dataset.get("ImageType")).upper()
    wanted = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    for keyword, count in wanted.items():
        value = dataset.get(keyword)
        if value is None or isinstance(value, str | float) or len(value) != count:
            raise _NoSlice(f"has no proper {keyword}, so its place is unknown", uid, localizer)
        numbers.append(np.array([float(part) for part in value]))
    position, orientation, spacing = numbers
    shape = (int(dataset.Rows), int(dataset.Columns))
    row, column = orientation[:3], orientation[3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if not (
        np.isfinite(np.concatenate(numbers)).all()
        and np.abs(position).max() < 1e5
        and np.abs(lengths - 1).max() < 1e-2
        and 0.05 < spacing.min() <= spacing.max() < 20
        and 1 < min(shape) <= max(shape) <= 4096
    ):
        raise _NoSlice("has an impossible geometry (orientation, pixel spacing or size)", uid)
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > 1e-3:
        raise _NoSlice("has rows and columns that are not at right angles", uid)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return position, np.stack([row, np.cross(normal, row), normal]), spacing, shape


def _pixel_layout(
    dataset: pydicom.Dataset, stream: BinaryIO, file_bytes: int, shape: tuple[int, int], uid: str
) -> _Pixels:
    """How the pixels are kept, which must be there to the last byte."""
    kind = str(dataset.get("PhotometricInterpretation"))
    if str(dataset.get("SamplesPerPixel")) != "1" or kind != "MONOCHROME2":
        raise _NoSlice("is a colour or inverted image, no CT numbers", uid)
    bits = int(dataset.get("BitsStored") or 0)
    if not 8 < bits <= 16 or int(dataset.get("BitsAllocated") or 0) != 16:
        raise _NoSlice("is an 8-bit or otherwise reduced picture, no CT numbers", uid)
    high, signed = dataset.get("HighBit"), dataset.get("PixelRepresentation")
    if (high is not None and int(high) != bits - 1) or signed not in (0, 1):
        raise _NoSlice("does not say properly how its pixels are stored", uid)
    if dataset.get("ModalityLUTSequence"):
        raise _NoSlice("keeps its CT numbers in a table (Modality LUT); convert it to NIfTI", uid)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        raise _NoSlice("has no RescaleSlope or RescaleIntercept, so its HU are unknown", uid)
    scale = float(slope), float(intercept)
    if not np.isfinite(scale).all() or scale[0] <= 0:
        raise _NoSlice("has an impossible RescaleSlope or RescaleIntercept", uid)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID"))
    implicit, little = dataset.original_encoding
    order = "<" if little else ">"
    length = _pixel_length(stream, bool(implicit), order)
    if syntax in _PLAIN:
        need = 2 * shape[0] * shape[1]
        if length not in (need, need + 1) or stream.tell() + need > file_bytes:
            raise _NoSlice("has fewer or more pixels than its header says (cut off?)", uid)
        offset = stream.tell()
    elif syntax in _COMPRESSED:
        if length != 0xFFFFFFFF or not _fragments_are_whole(stream, file_bytes):
            raise _NoSlice("is cut off within its compressed pixels", uid)
        offset = -1
    else:
        raise _NoSlice(f"has pixels compressed in an unknown way ({shown(syntax)[:64]})", uid)
    return _Pixels(offset, order, bits, signed == 1, *scale)


def _pixel_length(stream: BinaryIO, implicit: bool, order: str) -> int:
    """Length of the pixel element that starts here; its value comes next."""
    name = "little" if order == "<" else "big"
    head = stream.read(8 if implicit else 12)
    group = b"\xe0\x7f\x10\x00" if order == "<" else b"\x7f\xe0\x00\x10"
    if head[:4] != group or not (implicit or head[4:6] in (b"OW", b"OB", b"UN")):
        return -1
    return int.from_bytes(head[-4:], name)  # type: ignore[arg-type]


def _fragments_are_whole(stream: BinaryIO, file_bytes: int) -> bool:
    while len(head := stream.read(8)) == 8:
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"\xfe\xff\xdd\xe0":
            return True
        if head[:4] != b"\xfe\xff\x00\xe0" or stream.tell() + length > file_bytes:
            return False
        stream.seek(length, os.SEEK_CUR)
    return False


# --- choosing the series ---------------------------------------------------------------------


def _choose(files: list[tuple[Path, str]], series: str | int | None, path: Path) -> list[_Slice]:
    """The slices of the series to take, when it is certain that none is lost."""
    groups: dict[tuple[Any, ...], list[list[_Slice]]] = {}
    refused: list[tuple[str, _NoSlice]] = []
    foreign: list[tuple[str, _NoDicom]] = []
    for file, name in files:
        try:
            piece = _header(file, name)
        except _NoSlice as reason:
            refused.append((name, reason))
        except _NoDicom as reason:
            foreign.append((name, reason))
        else:
            _add(groups.setdefault(piece.series, []), piece, path)
    found = [group for same in groups.values() for group in same]
    if series is not None and found:
        found = _matching(found, str(series).strip(), path)
    if found:
        patients = {group[0].series[3] for group in found}
        if len(patients) > 1:
            raise DataError(f"{path} holds {len(patients)} patients: give the folder of one.")
        chosen = min(found, key=_rank)
        _refuse_lost_slices(chosen, refused, foreign, path)
        if series is None:
            _refuse_longer_rest(chosen, found, path)
        return [replace(piece, axes=chosen[0].axes) for piece in chosen]
    claims = [(name, reason) for name, reason in foreign if _is_named_dicom(name)]
    first = {str(reason): name for name, reason in reversed([*refused, *claims])}
    causes = [f"{name} {reason}" for reason, name in first.items()][:3]
    raise DataError(
        f"{path} holds no CT series that can be read ({'; '.join(causes) or 'no DICOM file'}): "
        "give the folder or zip archive with one patient's axial slices."
    )


def _add(groups: list[list[_Slice]], piece: _Slice, path: Path) -> None:
    """Put a slice to those of its orientation and pixel spacing, which rounding makes differ."""
    for group in groups:
        turned = np.abs(group[0].axes - piece.axes).max()
        wider = np.abs(np.subtract(group[0].spacing, piece.spacing)).max()
        if turned < 1e-3 and wider < 1e-3:
            group.append(piece)
            return
    if len(groups) > 50:
        raise DataError(f"{path} has a series whose orientation changes from slice to slice.")
    groups.append([piece])


def _matching(found: list[list[_Slice]], wanted: str, path: Path) -> list[list[_Slice]]:
    chosen = [group for group in found if wanted and wanted in group[0].series[:3]]
    different = {group[0].series[:6] for group in chosen}
    if len(different) == 1:
        return chosen
    names = "; ".join(
        shown(
            f"number {group[0].series[1] or '-'}, {group[0].series[2] or 'no description'}, "
            f"{len(group)} slices, UID {group[0].series[0] or '-'}"
        )
        for group in (chosen or found)[:10]
    )
    if chosen:
        raise ParameterError(
            f"series {wanted!r} is not unique in {path}: give the UID or description of one "
            f"({names})."
        )
    raise ParameterError(f"series {wanted!r} is not in {path}, which holds: {names}.")


def _rank(group: list[_Slice]) -> tuple[Any, ...]:
    key = group[0].series
    number = int(key[1]) if re.fullmatch(r"-?[0-9]{1,15}", key[1]) else 10**16
    return -len(group), key[7], number, *map(str, key), group[0].name


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return float("inf")
    return value if np.isfinite(value) else float("inf")


def _refuse_lost_slices(
    chosen: list[_Slice],
    refused: list[tuple[str, _NoSlice]],
    foreign: list[tuple[str, _NoDicom]],
    path: Path,
) -> None:
    """Raise if a file that was left aside may be a slice of the chosen series."""
    uid = chosen[0].series[0]
    lost: list[tuple[str, Exception]] = []
    lost += [(n, r) for n, r in refused if not r.aside and (r.uid is None or r.uid == uid)]
    alike = {re.sub("[0-9]+", "0", piece.name) for piece in chosen}
    lost += [(n, r) for n, r in foreign if _is_named_dicom(n) or re.sub("[0-9]+", "0", n) in alike]
    if lost:
        name, reason = lost[0]
        raise DataError(
            f"{path}: {name} {reason}; copy the series again, or take the file out of the folder "
            "if it is no slice of it."
        )


def _is_named_dicom(name: str) -> bool:
    return name.lower().endswith((".dcm", ".ima", ".dicom"))


def _refuse_longer_rest(chosen: list[_Slice], found: list[list[_Slice]], path: Path) -> None:
    """Raise if slices of the same series, told apart by their headers, reach further."""
    identity = chosen[0].series[0], chosen[0].series[3:6]
    heights = np.array([_height(piece) for piece in chosen])
    for group in found:
        if group is chosen or not identity[0]:
            continue
        if (group[0].series[0], group[0].series[3:6]) != identity:
            continue
        other = np.array([piece.position @ chosen[0].axes[2] for piece in group])
        beyond = max(heights.min() - other.min(), other.max() - heights.max())
        if beyond > _CUT_MM:
            raise DataError(
                f"{path} has one series whose headers fall into parts (as by {group[0].name}), of "
                f"which the largest leaves out {beyond:.0f} mm: choose one by `series` or separate "
                "them."
            )


# --- from slices to a volume -----------------------------------------------------------------


def _height(piece: _Slice) -> float:
    return float(piece.position @ piece.axes[2])


def _values(piece: _Slice, path: Path) -> NDArray[Any]:
    """Rescaled intensities of one file, (rows, columns)."""
    if piece.pixels.offset < 0:
        return _decoded(piece, path)
    how = piece.pixels
    raw = np.fromfile(piece.path, f"{how.order}u2", piece.shape[0] * piece.shape[1], "", how.offset)
    spare = 16 - how.bits
    values: NDArray[Any]
    if how.signed:
        values = (raw.astype(np.uint16) << spare).astype(np.int16) >> spare
    else:
        values = raw & np.uint16(2**how.bits - 1)
    kept = values.astype(np.uint16)
    if not (np.array_equal(kept, raw) or np.array_equal(kept & (2**how.bits - 1), raw)):
        raise DataError(
            f"{path}: {piece.name} has pixels that need more bits than its header says: export the "
            "series again."
        )
    return _short(values.reshape(piece.shape) * how.slope + how.intercept)


def _decoded(piece: _Slice, path: Path) -> NDArray[Any]:
    """Compressed pixels."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.SetFileName(str(piece.path))
        reader.ReadImageInformation()
        size = reader.GetSize()
        if tuple(size[:2]) == piece.shape[::-1] and int(np.prod(size[2:])) == 1:
            values = sitk.GetArrayFromImage(reader.Execute())
            if values.size == piece.shape[0] * piece.shape[1]:
                return _short(values.reshape(piece.shape))
        reason = f"{size[0]} x {size[1]} pixels decoded"
    except UnicodeError:
        reason = "its name is not plain text; rename it"
    except RuntimeError:
        reason = "damaged"
    raise DataError(
        f"{path}: {piece.name} has compressed pixels that cannot be read ({reason}): copy it again."
    )


def _short(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers as int16 where they fit, all else as float32."""
    if np.abs(values).max() < 2**15:
        whole = values.astype(np.int16)
        if np.array_equal(whole, values):
            return whole
    return values.astype(np.float32)


def _without_duplicates(
    slices: list[_Slice], pixels: list[NDArray[Any]], path: Path
) -> tuple[list[_Slice], list[NDArray[Any]]]:
    """Drop copies of a slice; take the largest of several acquisitions of one place."""
    kept: list[int] = []
    clash = -1
    for index, piece in enumerate(slices):
        if kept and _height(piece) - _height(slices[kept[-1]]) < _SAME_PLACE_MM:
            apart = np.abs(piece.position - slices[kept[-1]].position).max()
            if apart > 2 * _SAME_PLACE_MM or not np.array_equal(pixels[index], pixels[kept[-1]]):
                clash = index
            continue
        kept.append(index)
    if clash < 0:
        return [slices[k] for k in kept], [pixels[k] for k in kept]
    parts: dict[str, list[int]] = {}
    for index, piece in enumerate(slices):
        parts.setdefault(piece.acquisition, []).append(index)
    if len(parts) == 1:
        raise DataError(
            f"{path} holds different slices at the same place (as {slices[clash].name}), which "
            "nothing in their headers tells apart: separate the volumes into folders of their own."
        )
    largest = max(parts.values(), key=len)
    heights = [_height(piece) for piece in slices]
    covered = heights[largest[-1]] - heights[largest[0]]
    if heights[-1] - heights[0] - covered > _CUT_MM:
        raise DataError(
            f"{path} holds several acquisitions that overlap, none of which covers the whole "
            f"height of {heights[-1] - heights[0]:.0f} mm: separate them into folders of their own."
        )
    warnings.warn(
        f"{path}: of {len(parts)} acquisitions of one place, number "
        f"{slices[largest[0]].acquisition or '(none)'} with {len(largest)} slices was taken and "
        f"{len(slices) - len(largest)} slices were dropped.",
        DataWarning,
        stacklevel=2,
    )
    return _without_duplicates([slices[k] for k in largest], [pixels[k] for k in largest], path)


def _check_scales(slices: list[_Slice], path: Path) -> None:
    """All slices must count in the same units: the most common ones."""
    first = slices[0].pixels
    slope = float(np.median([piece.pixels.slope for piece in slices]))
    intercept = float(np.median([piece.pixels.intercept for piece in slices]))
    for piece in slices:
        how = piece.pixels
        if (how.bits, how.signed) != (first.bits, first.signed):
            what = "stores its pixels in another way than the first slice"
        elif abs(how.slope - slope) > 0.01 * slope or abs(how.intercept - intercept) > 100:
            what = (
                f"has a RescaleSlope or RescaleIntercept ({how.slope:.4g}, {how.intercept:.4g}) "
                f"unlike that of the other slices ({slope:.4g}, {intercept:.4g})"
            )
        else:
            continue
        raise DataError(f"{path}: {piece.name} {what}: export the series again.")


def _assemble(slices: list[_Slice], pixels: list[NDArray[Any]], path: Path) -> sitk.Image:
    if len(slices) < 2:
        raise DataError(f"{path} has one CT slice; a volume needs the whole series.")
    _check_scales(slices, path)
    heights = np.array([_height(piece) for piece in slices])
    positions = np.array([piece.position for piece in slices])
    axes = slices[0].axes
    step = float(np.median(np.diff(heights)))
    if step < _SAME_PLACE_MM:
        raise DataError(f"{path} has slices {step:.2g} mm apart, closer than those of any CT scan.")
    sideways = (positions - positions.mean(0)) @ axes[:2].T
    centred = heights - heights.mean()
    slope = centred @ sideways / (centred @ centred)
    if np.abs(sideways - np.outer(centred, slope)).max() > max(0.5, 0.1 * step):
        raise DataError(
            f"{path} has slices that jump sideways from one to the next: they belong to different "
            "reconstructions; separate them into folders of their own."
        )
    _refuse_interleaved(slices, heights, step, path)
    volume, step = _regular(np.stack(pixels), heights, step, path)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((*slices[0].spacing, step))
    image.SetOrigin(tuple(positions[0]))
    image.SetDirection(tuple(axes.T.ravel()))
    sheared = np.hypot(*slope) * (heights[-1] - heights[0]) > 0.5
    return _upright(image, slope, path) if sheared else image


def _refuse_interleaved(
    slices: list[_Slice], heights: NDArray[np.float64], step: float, path: Path
) -> None:
    """Raise if uneven slices come from acquisitions that overlap, as the patient moved between."""
    if np.abs(np.diff(heights) - step).max() <= max(0.02 * step, 0.02):
        return
    order = [piece.acquisition for piece in slices]
    changes = sum(one != other for one, other in pairwise(order))
    if changes >= len(set(order)):
        raise DataError(
            f"{path} holds acquisitions that overlap with slices at other heights: separate them "
            "into folders of their own."
        )


def _regular(
    volume: NDArray[Any], heights: NDArray[np.float64], step: float, path: Path
) -> tuple[NDArray[Any], float]:
    """The volume on evenly spaced slices, and their distance."""
    steps = np.diff(heights)
    if np.abs(steps - step).max() <= max(0.02 * step, 0.02):
        return volume, float((heights[-1] - heights[0]) / (len(heights) - 1))
    widest = int(steps.argmax())
    if steps[widest] > MAX_GAP_MM:
        raise DataError(
            f"{path} has a gap of {steps[widest]:.1f} mm between slices that mostly lie "
            f"{step:.1f} mm apart (after {heights[widest]:.1f} mm): slices are missing; export "
            "the series again."
        )
    warnings.warn(
        f"{path}: slices are {steps.min():.2f} to {steps.max():.2f} mm apart; they were "
        f"interpolated to every {step:.2f} mm.",
        DataWarning,
        stacklevel=2,
    )
    count = round((heights[-1] - heights[0]) / step) + 1
    if count * volume[0].size > MAX_VOXELS:
        raise DataError(f"{path} has slices too uneven for one volume ({count:,} would be needed).")
    places = np.linspace(heights[0], heights[-1], count)
    below = np.clip(np.searchsorted(heights, places, side="right") - 1, 0, len(heights) - 2)
    share = ((places - heights[below]) / steps[below])[:, None, None].astype(np.float32)
    mixed = volume[below] * (1 - share) + volume[below + 1] * share
    if np.issubdtype(volume.dtype, np.integer):
        mixed = mixed.round().astype(volume.dtype)
    return mixed, float(places[1] - places[0])


def _upright(image: sitk.Image, slope: NDArray[np.float64], path: Path) -> sitk.Image:
    """Undo the shear of a tilted gantry; `slope` is mm sideways (row, column) per mm of height."""
    angle = float(np.degrees(np.arctan(np.hypot(*slope))))
    if angle > _MAX_TILT:
        raise DataError(
            f"{path} has slices that move sideways as if the gantry were tilted by {angle:.0f} "
            f"degrees, over {_MAX_TILT:.0f}: their positions are wrong; export the series again."
        )
    axes = np.array(image.GetDirection()).reshape(3, 3).T
    height = (image.GetSize()[2] - 1) * image.GetSpacing()[2]
    reach = np.ceil(np.abs(slope) * height / image.GetSpacing()[:2]).astype(int)
    origin = np.array(image.GetOrigin())
    start = origin + sum(
        min(0.0, s) * height * axis for s, axis in zip(slope, axes[:2], strict=True)
    )
    size = [int(n + r) for n, r in zip(image.GetSize()[:2], reach, strict=True)]
    if size[0] * size[1] * image.GetSize()[2] > MAX_VOXELS:
        raise DataError(f"{path} would become too large when the gantry's tilt is undone.")
    warnings.warn(
        f"{path}: the gantry was tilted by {angle:.1f} degrees; the volume was resampled upright.",
        DataWarning,
        stacklevel=2,
    )
    # A point of the patient at height h lies h * slope further along in the stored, upright grid.
    shear = np.eye(3) - sum(
        s * np.outer(axis, axes[2]) for s, axis in zip(slope, axes[:2], strict=True)
    )
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(tuple(shear.ravel()))
    transform.SetCenter(tuple(origin))
    straight = sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32),
        [*size, image.GetSize()[2]],
        transform,
        sitk.sitkLinear,
        tuple(start),
        image.GetSpacing(),
        image.GetDirection(),
        -1024,
    )
    # Casting alone would cut off fractions and so darken the image by half a HU.
    whole = image.GetPixelID() == sitk.sitkInt16
    return sitk.Cast(sitk.Round(straight), sitk.sitkInt16) if whole else straight
