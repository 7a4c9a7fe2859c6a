"""Volumes in a single file: NIfTI-1, NRRD and MetaImage, read strictly.

The usual readers fill up what a cut-off file lacks, skip checksums, follow a header to other files
and guess a geometry they cannot understand. A CT number must not be guessed, so this one reads the
plain forms of the three formats and refuses the rest.
"""

import os
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from covidmtl_core.errors import DataError, DataWarning, ParameterError

MAX_VOXELS = 2**28
"""A volume that declares more is refused: 1024 slices of 512 x 512."""

_MAX_BYTES = 2**30
_MAX_HEADER = 2**16
_MAX_EXTENSION = 2**24
_MAX_VALUE = 1e6
_CHUNK = 2**16
_GZIP, _BZIP2 = b"\x1f\x8b", b"BZh"


class _Refused(Exception):
    """What is wrong with a file, as the rest of a sentence that starts with its path."""


@dataclass(frozen=True)
class _Layout:
    """What a header says."""

    size: tuple[int, int, int]
    dtype: np.dtype[Any]
    steps: NDArray[np.float64]
    """Columns: the way in mm to the next voxel along each axis, in ITK's LPS directions."""
    origin: NDArray[np.float64]
    offset: int = 0
    """Where the voxels start: in the unpacked bytes if all is packed (NIfTI), else in the file."""
    packed: bool = False
    scale: tuple[float, float] = (1.0, 0.0)
    doubt: str = ""
    """What the header leaves open about the geometry."""


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path, if its name can be handed to every library and printed.

    Raises:
        DataError: It is empty or not plain text in UTF-8.
        ParameterError: It is no path at all.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ParameterError(f"the path is {path!r}; it must be a text or a Path.")
    text = os.fspath(path)
    if not text:
        raise DataError("the path '' is empty: give that of a file or folder.")
    if not text.isprintable():
        raise DataError(f"{shown(text)} has characters in its name that cannot be used: rename it.")
    return Path(path)


def shown(name: str) -> str:
    """A name as it can be printed on one line."""
    return "".join(character if character.isprintable() else "?" for character in name)


def read_file(path: Path) -> sitk.Image:
    """Read one volume.

    Args:
        path: A .nii, .nii.gz, .nrrd or .mha file with its voxels in itself, plain or packed with
            gzip or zlib.

    Returns:
        3D image, int16, int32 or float32, without metadata; the header's rescaling applied.

    Raises:
        DataError: The file is damaged, cut off, or uses what this reader does not know.
    """
    try:
        with path.open("rb") as stream:
            layout = _parser(path)(stream, path.stat().st_size)
            _check(layout)
            stream.seek(0)
            values = _values(_voxels(stream, layout, path), layout)
        image = _image(values, layout)
    except _Refused as error:
        raise DataError(f"{path} {error}.") from error
    except (zlib.error, EOFError) as error:
        raise DataError(f"{path} is cut off or damaged inside: copy or fetch it again.") from error
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path} has a header that cannot be understood: convert it again from the original."
        ) from error
    if layout.doubt:
        swap = " (right and left may be swapped)" if "orientation" in layout.doubt else ""
        warnings.warn(
            f"{path}: the header gives no {layout.doubt}; the usual one was assumed{swap}.",
            DataWarning,
            stacklevel=2,
        )
    return image


def known_suffix(path: Path) -> str | None:
    """The suffix by which `read_file` knows a file, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _parser(path: Path) -> Callable[[BinaryIO, int], _Layout]:
    suffix = known_suffix(path)
    if suffix is None:
        raise _Refused(f"is not named {', '.join(SUFFIXES)}: name it by its type")
    return SUFFIXES[suffix]


# --- bytes -----------------------------------------------------------------------------------


def _inflate(stream: BinaryIO, limit: int) -> bytearray:
    """Unpack gzip or zlib data to its end, or to one byte more than `limit`; sums are verified."""
    made = bytearray()
    engine = zlib.decompressobj(47)
    packed = stream.read(_CHUNK)
    while len(made) <= limit:
        got = engine.decompress(packed, min(limit + 1 - len(made), 2**24))
        made += got
        if not engine.eof:
            packed = engine.unconsumed_tail or stream.read(_CHUNK)
            if not packed and not got:
                raise EOFError
            continue
        packed = engine.unused_data or stream.read(_CHUNK)
        while packed and not packed.strip(b"\0"):
            packed = stream.read(_CHUNK)
        if not packed:
            break
        engine = zlib.decompressobj(47)
    return made


def _voxels(stream: BinaryIO, layout: _Layout, path: Path) -> NDArray[Any]:
    """The voxels as stored, (z, y, x); the file must hold exactly those."""
    need = int(np.prod(layout.size)) * layout.dtype.itemsize
    whole = stream.read(2) == _GZIP
    start = layout.offset if whole else 0
    stream.seek(0 if whole else layout.offset)
    if layout.packed:
        data: bytes | bytearray = _inflate(stream, start + need)
        found = len(data) - start
    else:
        found = path.stat().st_size - layout.offset
        data = stream.read(need) if found == need else b""
    if found < need:
        raise _Refused(
            f"is cut off: its header tells of {need:,} bytes of voxels, but {max(found, 0):,} are "
            "there; copy or fetch it again"
        )
    if found > need:
        raise _Refused(
            f"holds more than the {need:,} bytes of voxels its header tells of, so one of the two "
            "is wrong; convert it again from the original"
        )
    return np.frombuffer(data, layout.dtype, offset=start).reshape(layout.size[::-1])


def _values(raw: NDArray[Any], layout: _Layout) -> NDArray[Any]:
    """The numbers meant, as int16, int32 or float32."""
    least, most = float(raw.min()), float(raw.max())
    if not np.isfinite([least, most]).all():
        raise _Refused("holds voxels that are no numbers (NaN or infinite); CT numbers are needed")
    slope, intercept = layout.scale
    reach = max(abs(least), abs(most))
    if max(reach, abs(slope) * reach + abs(intercept)) > _MAX_VALUE:
        raise _Refused(f"holds values from {least:.4g} to {most:.4g}, which are no CT numbers")
    if layout.scale != (1.0, 0.0):
        return raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if raw.dtype.kind == "f":
        return raw.astype(np.float32)
    short = np.iinfo(np.int16).min <= least and most <= np.iinfo(np.int16).max
    return raw.astype(np.int16 if short else np.int32)


# --- geometry --------------------------------------------------------------------------------


def _check(layout: _Layout) -> None:
    extent = " x ".join(map(str, layout.size))
    if min(layout.size) < 2:
        raise _Refused(f"is an image of {extent} voxels; one 3D volume is needed")
    voxels = float(np.prod([float(n) for n in layout.size]))
    if voxels > MAX_VOXELS or voxels * layout.dtype.itemsize > _MAX_BYTES:
        raise _Refused(
            f"declares {extent} voxels, more than the {MAX_VOXELS:,} a CT can have: its header is "
            "damaged; copy or fetch it again"
        )
    lengths = np.linalg.norm(layout.steps, axis=0)
    if not np.isfinite([*layout.steps.flat, *layout.origin]).all() or not lengths.min() > 0:
        raise _Refused(
            "has a geometry of impossible numbers (spacing, directions or origin); convert it "
            "again from the original"
        )
    axes = layout.steps / lengths
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        raise _Refused("has axes that are not at right angles; resample it to such first")


def _image(values: NDArray[Any], layout: _Layout) -> sitk.Image:
    image = sitk.GetImageFromArray(values)
    lengths = np.linalg.norm(layout.steps, axis=0)
    left, _, right = np.linalg.svd(layout.steps / lengths)
    image.SetSpacing([float(length) for length in lengths])
    image.SetDirection([float(part) for part in (left @ right + 0.0).ravel()])
    image.SetOrigin([float(part) for part in layout.origin])
    return image


def _three(sizes: list[int]) -> tuple[int, int, int]:
    """The three dimensions of a volume; a fourth may be there if it is 1."""
    if len(sizes) not in (3, 4) or min(sizes) < 1 or sizes[3:] not in ([], [1]):
        extent = " x ".join(map(str, sizes[:8])) or "no"
        raise _Refused(f"is an image of {extent} voxels; one 3D volume is needed")
    return sizes[0], sizes[1], sizes[2]


# --- NIfTI-1 ---------------------------------------------------------------------------------

_NIFTI_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_NIFTI_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}


def _nifti(stream: BinaryIO, file_bytes: int) -> _Layout:
    start = stream.read(3)
    stream.seek(0)
    if start == _BZIP2:
        raise _Refused("is packed with bzip2; unpack it or pack it with gzip")
    packed = start[:2] == _GZIP
    raw = bytes(_inflate(stream, 352) if packed else stream.read(352))[:352]
    if len(raw) < 352:
        raise _Refused("is cut off within its header; copy or fetch it again")
    order = _byte_order(raw)
    dim = np.frombuffer(raw, f"{order}i2", 8, 40)
    if not 1 <= dim[0] <= 7:
        raise _Refused(f"has {dim[0]} dimensions by its header, which is damaged; copy it again")
    size = _three([int(n) for n in dim[1 : 1 + dim[0]]])
    code, bits = (int(n) for n in np.frombuffer(raw, f"{order}i2", 2, 70))
    if code not in _NIFTI_TYPES:
        raise _Refused(f"holds voxels of type {code} (colours or the like); CT numbers are needed")
    dtype = np.dtype(order + _NIFTI_TYPES[code])
    if bits != 8 * dtype.itemsize:
        raise _Refused("contradicts itself about the bytes of a voxel; copy or fetch it again")
    offset, slope, intercept = (float(x) for x in np.frombuffer(raw, f"{order}f4", 3, 108))
    if not 352 <= offset <= _MAX_EXTENSION or offset != int(offset):
        raise _Refused("does not say properly where its voxels start; copy or fetch it again")
    if not np.isfinite([slope, intercept]).all():
        raise _Refused("has a rescaling of impossible numbers; copy or fetch it again")
    layout = _nifti_geometry(raw, order, size, dtype)
    scale = (slope, intercept) if slope else (1.0, 0.0)
    return replace(layout, offset=int(offset), packed=packed, scale=scale)


def _byte_order(raw: bytes) -> str:
    length = {order: int(np.frombuffer(raw, f"{order}i4", 1)[0]) for order in "<>"}
    if 540 in length.values():
        raise _Refused("is a NIfTI-2 file; convert it to NIfTI-1")
    if 348 not in length.values():
        raise _Refused("is no NIfTI file or has a damaged header; copy or fetch it again")
    if raw[344:348] != b"n+1\0":
        raise _Refused("is an ANALYZE or two-file NIfTI; convert it to a NIfTI-1 file (.nii)")
    return "<" if length["<"] == 348 else ">"


def _nifti_geometry(
    raw: bytes, order: str, size: tuple[int, int, int], dtype: np.dtype[Any]
) -> _Layout:
    """The header says the geometry up to three times; they must not contradict each other."""
    unit = _NIFTI_UNITS.get(raw[123] & 7)
    if unit is None:
        raise _Refused("gives its lengths in an unknown unit; convert it again from the original")
    pixdim = np.frombuffer(raw, f"{order}f4", 4, 76).astype(float)
    spacing = pixdim[1:] * unit
    if not np.isfinite(pixdim).all() or spacing.min() <= 0:
        raise _Refused("has an impossible voxel size; convert it again from the original")
    qcode, scode = (int(n) for n in np.frombuffer(raw, f"{order}i2", 2, 252))
    matrices = []
    if scode > 0:
        rows = np.frombuffer(raw, f"{order}f4", 12, 280).reshape(3, 4).astype(float) * unit
        lengths = np.linalg.norm(rows[:, :3], axis=0)
        if not np.allclose(lengths, spacing, rtol=0.02):
            raise _Refused(
                f"contradicts itself (voxels of {_by(spacing)} mm by pixdim, of {_by(lengths)} mm "
                "by sform); convert it again from the original"
            )
        matrices.append(rows)
    if qcode > 0:
        matrices.append(_qform(raw, order, pixdim[0], spacing, unit))
    if not matrices:
        return _Layout(size, dtype, np.diag(spacing), np.zeros(3), doubt="orientation")
    if len(matrices) == 2:
        corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
        corners[:, :3] *= np.array(size) - 1
        apart = float(np.abs((matrices[0] - matrices[1]) @ corners.T).max())
        if not apart <= 0.5:
            raise _Refused(
                f"gives two geometries (sform and qform) that lie {apart:.3g} mm apart; convert it "
                "again from the original"
            )
    # NIfTI counts to the right and front, ITK to the left and back.
    lps = matrices[0] * np.array([[-1.0], [-1.0], [1.0]])
    return _Layout(size, dtype, lps[:, :3], lps[:, 3])


def _qform(
    raw: bytes, order: str, sign: float, spacing: NDArray[np.float64], unit: float
) -> NDArray[np.float64]:
    b, c, d, *offset = np.frombuffer(raw, f"{order}f4", 6, 256).astype(float)
    rest = 1 - (b * b + c * c + d * d)
    if not rest > -1e-3:
        raise _Refused("has an impossible rotation (qform); convert it again from the original")
    a = np.sqrt(max(rest, 0.0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    steps = rotation * spacing * [1, 1, -1 if sign < 0 else 1]
    return np.column_stack([steps, np.array(offset) * unit])


def _by(values: Any) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


# --- headers of text -------------------------------------------------------------------------


def _header_text(stream: BinaryIO, end: re.Pattern[bytes]) -> tuple[list[str], int]:
    """Lines of a header in ASCII, and where the voxels start."""
    start = stream.read(_MAX_HEADER)
    found = end.search(start)
    if not found:
        raise _Refused("has no header that can be read; copy or fetch it again")
    text = start[: found.end()]
    if not text.isascii():
        raise _Refused("has a damaged header (not plain text); copy or fetch it again")
    return text.decode("ascii").splitlines(), found.end()


def _numbers(fields: dict[str, str], key: str, count: int) -> NDArray[np.float64]:
    parts = fields[key].split()
    try:
        numbers = np.array([float(part) for part in parts if "_" not in part])
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) != count or len(parts) != count or not np.isfinite(numbers).all():
        raise _Refused(f"has a header whose '{key}' is not {count} numbers; copy it again")
    return numbers


def _whole(fields: dict[str, str], key: str) -> list[int]:
    parts = fields.get(key, "").split()
    if not parts or not all(re.fullmatch(r"-?\d{1,18}", part) for part in parts):
        raise _Refused(f"has a header whose '{key}' is not whole numbers; copy it again")
    return [int(part) for part in parts]


# --- NRRD ------------------------------------------------------------------------------------

_NRRD_TYPES = {
    name: dtype
    for dtype, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": "longlong,long long,long long int,signed long long,int64,int64_t",
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}
_NRRD_SPACES = {
    "left-posterior-superior": (1, 1),
    "lps": (1, 1),
    "right-anterior-superior": (-1, -1),
    "ras": (-1, -1),
    "left-anterior-superior": (1, -1),
    "las": (1, -1),
}
_NRRD_FIELDS = {
    "content", "number", "type", "dimension", "space", "space dimension", "sizes", "spacings",
    "thicknesses", "axis mins", "axismins", "axis maxs", "axismaxs", "centers", "centerings",
    "labels", "units", "min", "max", "old min", "oldmin", "old max", "oldmax", "data file",
    "datafile", "endian", "encoding", "line skip", "lineskip", "byte skip", "byteskip",
    "sample units", "sampleunits", "space units", "space origin", "space directions",
    "measurement frame", "kinds",
}  # fmt: skip
_NRRD_END = re.compile(rb"\r?\n\r?\n")


def _nrrd(stream: BinaryIO, file_bytes: int) -> _Layout:
    lines, offset = _header_text(stream, _NRRD_END)
    if not re.fullmatch(r"NRRD000[1-5]", lines[0]):
        raise _Refused("is no NRRD file or has a damaged header; copy or fetch it again")
    fields = _nrrd_fields(lines[1:])
    if "data file" in fields or "datafile" in fields:
        raise _Refused("keeps its voxels in another file; save it as one file with its voxels")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise _Refused(f"has the encoding {encoding or 'none'!r}; save it as raw or gzip")
    if any(
        fields.get(key, "0") != "0" for key in ("line skip", "lineskip", "byte skip", "byteskip")
    ):
        raise _Refused("skips bytes before its voxels; save it anew without that")
    kind, endian = fields.get("type", "").lower(), fields.get("endian", "").lower()
    if kind not in _NRRD_TYPES:
        raise _Refused(f"holds voxels of type {kind or 'none'!r}; CT numbers are needed")
    dtype = np.dtype(_NRRD_TYPES[kind])
    if dtype.itemsize > 1 and endian not in ("little", "big"):
        raise _Refused("does not say its byte order ('endian'); save it anew")
    sizes = _whole(fields, "sizes")
    if _whole(fields, "dimension") != [len(sizes)]:
        raise _Refused("contradicts itself about its dimensions; copy or fetch it again")
    size = _three(sizes)
    kinds = fields.get("kinds", "").lower().split()[:3]
    if not {*kinds} <= {"domain", "space", "???", "none"}:
        raise _Refused("holds colours, vectors or a series in time, not CT numbers")
    dtype = dtype.newbyteorder(">" if endian == "big" else "<")
    steps, origin, doubt = _nrrd_geometry(fields, len(sizes))
    return _Layout(size, dtype, steps, origin, offset, encoding != "raw", doubt=doubt)


def _nrrd_fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        if not line.strip() or line.startswith("#") or ":=" in line:
            continue
        key, colon, value = line.partition(": ")
        key = key.strip().lower()
        if not colon or key not in _NRRD_FIELDS or key in fields:
            raise _Refused(f"has a damaged header (at {shown(line[:30])!r}); copy it again")
        fields[key] = value.strip()
    return fields


def _nrrd_geometry(
    fields: dict[str, str], dimensions: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """Steps, origin, and what is in doubt."""
    units = {*re.findall(r'"([^"]*)"', fields.get("space units", ""))}
    if not units <= {"mm", ""}:
        raise _Refused(f"gives its lengths in {', '.join(sorted(units))}; save it in mm")
    space = fields.get("space", "").lower()
    if space and space not in _NRRD_SPACES:
        raise _Refused(f"has the space {space!r}; save it in left-posterior-superior")
    if "space directions" not in fields:
        if "spacings" not in fields:
            raise _Refused("gives no voxel size; convert it again from the original")
        text = fields["spacings"].split()
        steps = np.diag(_numbers({"spacings": " ".join(text[:3])}, "spacings", 3))
        if len(text) != dimensions or steps.min() < 0:
            raise _Refused("has an impossible voxel size; convert it again from the original")
        return steps, np.zeros(3), "orientation and place"
    directions = fields["space directions"].lower()
    vector = r"\(\s*([^,()]+),([^,()]+),([^,()]+)\)"
    if not re.fullmatch(
        rf"{vector}\s+{vector}\s+{vector}" + r"(\s+none)?" * (dimensions - 3), directions
    ):
        raise _Refused("has 'space directions' that are not three vectors; copy it again")
    three = " ".join(" ".join(found) for found in re.findall(vector, directions))
    steps = _numbers({"space directions": three}, "space directions", 9).reshape(3, 3).T
    origin = re.fullmatch(vector, fields.get("space origin", "").strip())
    if not origin:
        raise _Refused("gives no place ('space origin'); convert it again from the original")
    place = _numbers({"space origin": " ".join(origin.groups())}, "space origin", 3)
    flip = np.array([*_NRRD_SPACES.get(space, (1, 1)), 1.0])
    return steps * flip[:, None], place * flip, "" if space else "orientation"


# --- MetaImage -------------------------------------------------------------------------------

_MHA_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_MHA_KEYS = {
    "ObjectType", "ObjectSubType", "NDims", "BinaryData", "BinaryDataByteOrderMSB",
    "ElementByteOrderMSB", "CompressedData", "CompressedDataSize", "CompressionLevel",
    "TransformMatrix", "Offset", "CenterOfRotation", "AnatomicalOrientation", "ElementSpacing",
    "ElementSize", "DimSize", "HeaderSize", "ElementType", "ElementNumberOfChannels", "ElementMin",
    "ElementMax", "ElementNBits", "ElementToIntensityFunctionSlope",
    "ElementToIntensityFunctionOffset", "Modality", "SequenceID", "DistanceUnits", "Comment",
    "Name", "ID", "ParentID", "Color", "AcquisitionDate", "ElementDataFile",
}  # fmt: skip
_MHA_OTHER = re.compile(r"[0-9a-fA-F]{4}\|[0-9a-fA-F]{4}|ITK_\w+")
"""DICOM tags and notes that ITK copies into the header; they say nothing about the voxels."""
_MHA_END = re.compile(rb"(?:^|\n)ElementDataFile *=[^\n]*\n")
_MHA_FIXED = {
    "ObjectType": ("Image",),
    "BinaryData": ("True",),
    "HeaderSize": ("0",),
    "ElementNumberOfChannels": ("1",),
    "ElementToIntensityFunctionSlope": ("1",),
    "ElementToIntensityFunctionOffset": ("0",),
    "DistanceUnits": ("mm", "?"),
    "CompressedData": ("True", "False"),
    "BinaryDataByteOrderMSB": ("True", "False"),
    "ElementByteOrderMSB": ("True", "False"),
}


def _mha(stream: BinaryIO, file_bytes: int) -> _Layout:
    lines, offset = _header_text(stream, _MHA_END)
    fields: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        key = key.strip()
        if not equals or key in fields or not (key in _MHA_KEYS or _MHA_OTHER.fullmatch(key)):
            raise _Refused(f"has a damaged header (at {shown(line[:30])!r}); copy it again")
        fields[key] = value.strip()
    if fields["ElementDataFile"] != "LOCAL":
        raise _Refused("keeps its voxels in another file; save it as one file with its voxels")
    for key, allowed in _MHA_FIXED.items():
        if fields.get(key, allowed[0]) not in allowed:
            raise _Refused(f"has {key} = {shown(fields[key][:30])!r} in its header; save it anew")
    kind = fields.get("ElementType", "")
    if kind not in _MHA_TYPES:
        raise _Refused(f"holds voxels of type {kind[:30] or 'none'!r}; CT numbers are needed")
    sizes = _whole(fields, "DimSize")
    if _whole(fields, "NDims") != [len(sizes)]:
        raise _Refused("contradicts itself about its dimensions; copy or fetch it again")
    size = _three(sizes)
    if "BinaryData" not in fields:
        raise _Refused("does not say whether its voxels are binary ('BinaryData'); save it anew")
    orders = {fields[k] for k in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if k in fields}
    if len(orders) != 1:
        raise _Refused("does not say its byte order ('BinaryDataByteOrderMSB'); save it anew")
    dtype = np.dtype(_MHA_TYPES[kind]).newbyteorder(">" if orders == {"True"} else "<")
    packed = fields.get("CompressedData") == "True"
    if packed and "CompressedDataSize" in fields:
        if _whole(fields, "CompressedDataSize") != [file_bytes - offset]:
            raise _Refused("is cut off or damaged (its packed size is wrong); copy it again")
    steps, origin, doubt = _mha_geometry(fields, len(sizes))
    return _Layout(size, dtype, steps, origin, offset, packed, doubt=doubt)


def _mha_geometry(
    fields: dict[str, str], dimensions: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """Steps, origin, and what is in doubt."""
    if "ElementSpacing" not in fields:
        raise _Refused("gives no voxel size; convert it again from the original")
    spacing = _numbers(fields, "ElementSpacing", dimensions)[:3]
    if spacing.min() <= 0:
        raise _Refused("has an impossible voxel size; convert it again from the original")
    missing = [key for key in ("TransformMatrix", "Offset") if key not in fields]
    origin, axes = np.zeros(dimensions), np.eye(dimensions)
    if "Offset" in fields:
        origin = _numbers(fields, "Offset", dimensions)
    if "TransformMatrix" in fields:
        axes = _numbers(fields, "TransformMatrix", dimensions**2).reshape(dimensions, dimensions)
    if np.abs(np.linalg.norm(axes[:3, :3], axis=1) - 1).max() > 1e-3:
        raise _Refused("has directions that are not of length 1; convert it from the original")
    names = {"TransformMatrix": "orientation", "Offset": "place"}
    return axes[:3, :3].T * spacing, origin[:3], " and ".join(names[key] for key in missing)


SUFFIXES: dict[str, Callable[[BinaryIO, int], _Layout]] = {
    ".nii.gz": _nifti,
    ".nii": _nifti,
    ".nrrd": _nrrd,
    ".mha": _mha,
}
