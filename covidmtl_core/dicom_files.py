"""Which files of a folder or archive hold CT slices, and what their headers say."""

import os
import re
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RawDataStorage,
)

from covidmtl_core.errors import DataError
from covidmtl_core.volume_files import shown

MAX_ARCHIVE_BYTES = 2 * 2**30
"""An archive that unpacks to more is refused."""

_MAX_FILES = 20_000
_MAX_MEMBER_BYTES = 64 * 2**20
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
class PixelLayout:
    """How and where a file keeps its pixels."""

    offset: int
    """Where uncompressed pixels start; -1 if they are compressed."""
    order: str
    bits: int
    signed: bool
    slope: float
    intercept: float


@dataclass(frozen=True)
class Slice:
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
    pixels: PixelLayout


class NoSlice(Exception):
    """Why a file is no slice of a CT volume.

    Attributes:
        aside: It is an image of its own kind, rightly left aside.
        uid: Its SeriesInstanceUID; None if the file cannot be read at all.
    """

    def __init__(self, reason: str, uid: str | None = None, aside: bool = False):
        super().__init__(reason)
        self.uid, self.aside = uid, aside


class NoDicom(Exception):
    """Why a file is not DICOM."""


def is_dicom(path: Path) -> bool:
    """Does a file start as a DICOM file does?"""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def is_deflated(path: Path) -> bool:
    """Is a whole DICOM file packed? Unpacking it has no bound, so it is refused."""
    return read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian


# --- finding the files -----------------------------------------------------------------------


@contextmanager
def found_files(path: Path) -> Iterator[list[tuple[Path, str]]]:
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


def read_header(file: Path, name: str) -> Slice:
    """The slice a file holds; raises why it holds none."""
    try:
        if not is_dicom(file):
            raise NoDicom("is no DICOM file (damaged, or cut off)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_deflated(file):
                raise NoSlice("is a packed (deflated) DICOM file; export it without that")
            with file.open("rb") as stream:
                dataset = pydicom.dcmread(
                    stream, stop_before_pixels=True, specific_tags=list(_TAGS)
                )
                return _slice(file, name, dataset, stream)
    except (NoSlice, NoDicom):
        raise
    except PermissionError:
        raise NoSlice("cannot be opened: permit reading it") from None
    except FileNotFoundError:
        raise NoDicom("is a link to a file that is not there") from None
    except Exception:
        # pydicom raises anything on a damaged header, RecursionError included.
        raise NoSlice("has a damaged DICOM header") from None


def _slice(file: Path, name: str, dataset: pydicom.Dataset, stream: BinaryIO) -> Slice:
    def text(keyword: str) -> str:
        value = dataset.get(keyword)
        return "" if value is None else str(value).strip()

    uid, modality = text("SeriesInstanceUID"), text("Modality")
    meta = dataset.file_meta.get("MediaStorageSOPClassUID")
    ends = not stream.read(1)
    if ends and ("SeriesInstanceUID" not in dataset or modality == "CT") and meta not in _NO_IMAGES:
        # A header that stops too early may have lost or shortened its UID.
        raise NoSlice("is cut off within its header or has no pixels")
    stream.seek(-1 if not ends else 0, os.SEEK_CUR)
    if modality != "CT":
        if modality or meta in _NO_IMAGES:
            raise NoSlice(f"has the modality {shown(modality) or '(none)'}, not CT", uid)
        raise NoSlice("does not say its modality")
    try:
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise NoSlice("is a multi-frame file; convert it to NIfTI (dcm2niix)", uid)
        position, axes, spacing, shape = _geometry(dataset, uid)
        if "LOCALIZER" in text("ImageType").upper():
            raise NoSlice("is a localizer", uid, aside=abs(axes[2, 2]) < 0.7)
        if abs(axes[2, 2]) < 0.7:
            raise NoSlice("is a reformat that is not axial", uid, aside=True)
        pixels = _pixel_layout(dataset, stream, file.stat().st_size, shape, uid)
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise NoSlice("has a damaged DICOM header", uid) from None
    identity = [text(keyword) for keyword in _KEY_TAGS]
    thickness = text("SliceThickness")
    thick = round(number_of(thickness), 3) if thickness else float("inf")
    return Slice(
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
            raise NoSlice(f"has no proper {keyword}, so its place is unknown", uid, localizer)
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
        raise NoSlice("has an impossible geometry (orientation, pixel spacing or size)", uid)
    row, column = row / lengths[0], column / lengths[1]
    if abs(row @ column) > 1e-3:
        raise NoSlice("has rows and columns that are not at right angles", uid)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return position, np.stack([row, np.cross(normal, row), normal]), spacing, shape


def _pixel_layout(
    dataset: pydicom.Dataset, stream: BinaryIO, file_bytes: int, shape: tuple[int, int], uid: str
) -> PixelLayout:
    """How the pixels are kept, which must be there to the last byte."""
    kind = str(dataset.get("PhotometricInterpretation"))
    if str(dataset.get("SamplesPerPixel")) != "1" or kind != "MONOCHROME2":
        raise NoSlice("is a colour or inverted image, no CT numbers", uid)
    bits = int(dataset.get("BitsStored") or 0)
    if not 8 < bits <= 16 or int(dataset.get("BitsAllocated") or 0) != 16:
        raise NoSlice("is an 8-bit or otherwise reduced picture, no CT numbers", uid)
    high, signed = dataset.get("HighBit"), dataset.get("PixelRepresentation")
    if (high is not None and int(high) != bits - 1) or signed not in (0, 1):
        raise NoSlice("does not say properly how its pixels are stored", uid)
    if dataset.get("ModalityLUTSequence"):
        raise NoSlice("keeps its CT numbers in a table (Modality LUT); convert it to NIfTI", uid)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        raise NoSlice("has no RescaleSlope or RescaleIntercept, so its HU are unknown", uid)
    scale = float(slope), float(intercept)
    if not np.isfinite(scale).all() or scale[0] <= 0:
        raise NoSlice("has an impossible RescaleSlope or RescaleIntercept", uid)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID"))
    implicit, little = dataset.original_encoding
    order = "<" if little else ">"
    length = _pixel_length(stream, bool(implicit), order)
    if syntax in _PLAIN:
        need = 2 * shape[0] * shape[1]
        if length not in (need, need + 1) or stream.tell() + need > file_bytes:
            raise NoSlice("has fewer or more pixels than its header says (cut off?)", uid)
        offset = stream.tell()
    elif syntax in _COMPRESSED:
        if length != 0xFFFFFFFF or not _fragments_are_whole(stream, file_bytes):
            raise NoSlice("is cut off within its compressed pixels", uid)
        offset = -1
    else:
        raise NoSlice(f"has pixels compressed in an unknown way ({shown(syntax)[:64]})", uid)
    return PixelLayout(offset, order, bits, signed == 1, *scale)


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


def number_of(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return float("inf")
    return value if np.isfinite(value) else float("inf")
