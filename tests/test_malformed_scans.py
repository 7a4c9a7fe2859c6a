"""Whatever is wrong with a scan, one clear sentence says so, soon; it is never read as if whole."""

import gzip
import os
import re
import socket
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1

from covidmtl_core import ct, dicom, phantom
from covidmtl_core.errors import DataError, ParameterError


@dataclass
class Good:
    """Whole scans, as bytes."""

    image: sitk.Image
    slices: list[bytes]
    nifti: bytes
    nifti_gz: bytes
    nrrd: bytes
    nrrd_gz: bytes
    mha: bytes
    mha_z: bytes
    volume: bytes
    real: Path

    @property
    def voxels(self) -> np.ndarray:
        return sitk.GetArrayFromImage(self.image)


Case = Callable[[Good, Path], Path]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__] = make
    return make


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("good")
    patient = phantom.draw_patient(1, 0.2, noise=3.0)
    image = phantom.make_phantom(patient, size=[40, 64, 64], spacing_mm=[6, 5, 5]).image
    dicom.write_series(image, folder / "s")
    slices = sorted((pydicom.dcmread(f) for f in (folder / "s").iterdir()), key=instance)
    written = {}
    for name in ("a.nii", "b.nii.gz", "c.nrrd", "d.mha"):
        sitk.WriteImage(image, str(folder / name), False)
        written[name] = (folder / name).read_bytes()
    for name in ("c.nrrd", "d.mha"):
        sitk.WriteImage(image, str(folder / name), True)
        written["packed " + name] = (folder / name).read_bytes()
    ct.write_volume(image, folder / "v")
    return Good(
        image,
        [saved(dataset) for dataset in slices],
        written["a.nii"],
        written["b.nii.gz"],
        written["c.nrrd"],
        written["packed c.nrrd"],
        written["d.mha"],
        written["packed d.mha"],
        (folder / "v").read_bytes(),
        Path(os.environ.get("COVIDMTL_TEST_CT") or "/nonexistent"),
    )


def instance(dataset: pydicom.Dataset) -> int:
    return int(dataset.InstanceNumber)


def saved(dataset: pydicom.Dataset) -> bytes:
    stream = BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def series(good: Good, folder: Path, suffix: str = ".dcm") -> Path:
    for index, data in enumerate(good.slices):
        put(folder / f"{index:03d}{suffix}", data)
    return folder


def edited(
    good: Good, folder: Path, edit: Callable[[pydicom.Dataset], object], one: bool = False
) -> Path:
    """A series with every slice changed, or only the last, which no gap would betray."""
    for index, data in enumerate(good.slices[FIRST:], FIRST):
        if not one or index == 39:
            dataset = pydicom.dcmread(BytesIO(data))
            edit(dataset)
            data = saved(dataset)
        put(folder / f"{index:03d}.dcm", data)
    return folder


FIRST = 22
"""The slices from this one on make a volume too, in less time."""


def raw(dataset: pydicom.Dataset, keyword: str, value: bytes) -> None:
    """Put bytes into a dataset unchecked."""
    tag = pydicom.tag.Tag(keyword)
    kind = pydicom.datadict.dictionary_VR(tag)
    dataset[tag] = pydicom.dataelem.RawDataElement(tag, kind, len(value), value, 0, False, True)


def test_the_good_ones_are_read(good: Good, tmp_path: Path) -> None:
    """Else all that follows would prove nothing."""
    (tmp_path / "s").mkdir()
    paths = [
        series(good, tmp_path / "s"),
        put(tmp_path / "x.nii", good.nifti),
        put(tmp_path / "x.nii.gz", good.nifti_gz),
        put(tmp_path / "x.nrrd", good.nrrd),
        put(tmp_path / "y.nrrd", good.nrrd_gz),
        put(tmp_path / "x.mha", good.mha),
        put(tmp_path / "y.mha", good.mha_z),
        put(tmp_path / "v", good.volume),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "part").mkdir()
        part = ct.read_ct(edited(good, tmp_path / "part", lambda _: None))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(part), good.voxels[FIRST:])
        for path in paths:
            got = sitk.GetArrayFromImage(ct.read_ct(path))
            np.testing.assert_array_equal(got, good.voxels)


def refused(path: str | Path, series: Any = None) -> str:
    """The message with which a scan is refused."""
    start = time.perf_counter()
    with pytest.raises((DataError, ParameterError)) as caught:
        ct.read_ct(path, series)
    assert time.perf_counter() - start < 10
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search(r"0x[0-9a-f]+|\bITK\b|gdcm|GDCM|Traceback|Error\b|<class", message), (
        message
    )
    return message


# --- single files ----------------------------------------------------------------------------

FILES = {
    "x.nii": "nifti",
    "x.nii.gz": "nifti_gz",
    "x.nrrd": "nrrd",
    "y.nrrd": "nrrd_gz",
    "x.mha": "mha",
    "y.mha": "mha_z",
    "v.dcm": "volume",
}


@pytest.mark.parametrize("kept", [0, 1, 100, 347, 0.5, 0.9, -9, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_cut_off_file_is_refused(good: Good, tmp_path: Path, name: str, kept: float) -> None:
    data = getattr(good, FILES[name])
    length = int(kept * len(data)) if isinstance(kept, float) else kept
    if name == "v.dcm" and length == -1:
        pytest.skip("the last byte of a volume only ends its list of slices")
    path = put(tmp_path / name, data[:length])
    assert str(path) in refused(path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["x.nii.gz", "y.nrrd", "y.mha", "v.dcm"])
def test_a_flipped_bit_in_packed_voxels_is_noticed(
    good: Good, tmp_path: Path, name: str, seed: int
) -> None:
    data = bytearray(getattr(good, FILES[name]))
    place = np.random.default_rng(seed).integers(len(data) // 4, len(data) * 3 // 4)
    if name == "v.dcm":
        place = data.index(b"IDAT", int(place)) + 40
    data[place] ^= 4
    path = put(tmp_path / name, bytes(data))
    assert str(path) in refused(path)


@pytest.mark.parametrize("name", FILES)
def test_bytes_too_many_are_noticed(good: Good, tmp_path: Path, name: str) -> None:
    if name == "v.dcm":
        pytest.skip("DICOM allows what follows")
    path = put(tmp_path / name, getattr(good, FILES[name]) + b"more" * 10)
    assert str(path) in refused(path)


NIFTI: dict[str, list[tuple[str, int, tuple[float, ...]]]] = {
    "giant": [("<4h", 40, (3, 32767, 32767, 32767))],
    "negative size": [("<4h", 40, (3, -64, 64, 40))],
    "no size": [("<4h", 40, (3, 0, 64, 40))],
    "half the slices": [("<4h", 40, (3, 64, 64, 20))],
    "2D": [("<h", 40, (2,))],
    "0D": [("<h", 40, (0,))],
    "9D": [("<h", 40, (9,))],
    "in time": [("<5h", 40, (4, 64, 64, 20, 2))],
    "all sizes": [("<8h", 40, (7, *[32767] * 7))],
    "float": [("<2h", 70, (16, 32))],
    "colours": [("<2h", 70, (128, 24))],
    "complex": [("<2h", 70, (32, 64))],
    "no type": [("<2h", 70, (0, 0))],
    "bits": [("<2h", 70, (4, 8))],
    "no sform": [("<12f", 280, (0,) * 12)],
    "sform nan": [("<f", 280, (float("nan"),))],
    "origin nan": [("<f", 292, (float("nan"),))],
    "origin far": [("<h", 252, (0,)), ("<f", 292, (1e6,))],
    "mirrored": [("<f", 280, (5,))],
    "shifted": [("<f", 292, (100,))],
    "skewed": [("<h", 252, (0,)), ("<f", 288, (1,))],
    "pixdim": [("<3f", 80, (1, 1, 1))],
    "pixdim 0": [("<3f", 80, (5, 5, 0)), ("<h", 254, (0,))],
    "pixdim nan": [("<3f", 80, (float("nan"), 5, 6)), ("<h", 254, (0,))],
    "pixdim negative": [("<3f", 80, (-5, 5, 6)), ("<h", 254, (0,))],
    "quaternion": [("<3f", 256, (5, 5, 5)), ("<h", 254, (0,))],
    "quaternion nan": [("<3f", 256, (float("nan"), 0, 0)), ("<h", 254, (0,))],
    "offset nan": [("<3f", 268, (float("nan"), 0, 0)), ("<h", 254, (0,))],
    "unit": [("<B", 123, (7,))],
    "metres": [("<B", 123, (1,))],
    "slope nan": [("<2f", 112, (float("nan"), 0))],
    "slope inf": [("<2f", 112, (float("inf"), 0))],
    "slope 2": [("<2f", 112, (2, 0))],
    "slope tiny": [("<2f", 112, (1e-30, 0))],
    "intercept": [("<2f", 112, (1, 1024))],
    "voxels at 0": [("<f", 108, (0,))],
    "voxels at 348": [("<f", 108, (348,))],
    "voxels at 360": [("<f", 108, (360,))],
    "voxels at nan": [("<f", 108, (float("nan"),))],
    "voxels at 1e30": [("<f", 108, (1e30,))],
    "two files": [("<4B", 344, (110, 105, 49, 0))],
    "ANALYZE": [("<4B", 344, (0, 0, 0, 0))],
    "NIfTI-2": [("<i", 0, (540,))],
    "no NIfTI": [("<i", 0, (0,))],
}


@pytest.mark.parametrize("name", NIFTI)
def test_a_damaged_nifti_header_is_refused(good: Good, tmp_path: Path, name: str) -> None:
    data = bytearray(good.nifti)
    for kind, place, values in NIFTI[name]:
        struct.pack_into(kind, data, place, *values)
    for path, content in {"x.nii": bytes(data), "x.nii.gz": gzip.compress(data, 1)}.items():
        assert str(tmp_path / path) in refused(put(tmp_path / path, content))


NRRD = {
    "giant": ("sizes: 64 64 40", "sizes: 1000000 1000000 1000000"),
    "overflowing": ("sizes: 64 64 40", "sizes: 18446744073709551615 64 40"),
    "negative": ("sizes: 64 64 40", "sizes: -64 64 40"),
    "half": ("sizes: 64 64 40", "sizes: 64 64 20"),
    "2D": ("sizes: 64 64 40", "sizes: 64 2560"),
    "type": ("type: short", "type: block"),
    "wrong type": ("type: short", "type: ushort"),
    "bzip2": ("encoding: raw", "encoding: bzip2"),
    "text": ("encoding: raw", "encoding: ascii"),
    "no encoding": ("encoding: raw\n", ""),
    "no order": ("endian: little\n", ""),
    "no directions": ("space directions: (5,0,0) (0,5,0) (0,0,6)\n", ""),
    "skewed": ("(0,5,0)", "(2,5,0)"),
    "no length": ("(0,5,0)", "(0,0,0)"),
    "parallel": ("(0,5,0)", "(5,0,0)"),
    "nan": ("(0,5,0)", "(nan,5,0)"),
    "none": ("(0,5,0)", "none"),
    "cut vector": ("(0,5,0)", "(0,5"),
    "space": ("space: left-posterior-superior", "space: scanner-xyz"),
    "centimetres": ("endian", 'space units: "cm" "cm" "cm"\nendian'),
    "colours": ("kinds: domain domain domain", "kinds: domain domain vector"),
    "unknown key": ("endian", "endiam"),
    "twice": ("endian: little", "endian: little\nendian: little"),
    "elsewhere": ("endian", "data file: /etc/passwd\nendian"),
    "skip": ("endian", "byte skip: -1\nendian"),
    "not text": ("endian", "Gr\u00f6\u00dfe:=3\nendian"),
    "other magic": ("NRRD0004", "NRRD0009"),
    "no end": ("\n\n", "\n"),
    "long": ("endian", "# " + "x" * 100_000 + "\nendian"),
}


@pytest.mark.parametrize("name", NRRD)
def test_a_damaged_nrrd_header_is_refused(good: Good, tmp_path: Path, name: str) -> None:
    end = good.nrrd.index(b"\n\n") + 2
    old, new = NRRD[name]
    header = good.nrrd[:end].decode()
    assert old in header
    path = put(tmp_path / "x.nrrd", header.replace(old, new).encode() + good.nrrd[end:])
    assert str(path) in refused(path)


MHA = {
    "giant": ("DimSize = 64 64 40", "DimSize = 100000 100000 100000"),
    "negative": ("DimSize = 64 64 40", "DimSize = -64 64 40"),
    "half": ("DimSize = 64 64 40", "DimSize = 64 64 20"),
    "dimensions": ("NDims = 3", "NDims = 999999999"),
    "type": ("MET_SHORT", "MET_SHORT_ARRAY"),
    "wrong type": ("MET_SHORT", "MET_FLOAT"),
    "no spacing": ("ElementSpacing = 5 5 6\n", ""),
    "spacing 0": ("ElementSpacing = 5 5 6", "ElementSpacing = 5 5 0"),
    "spacing nan": ("ElementSpacing = 5 5 6", "ElementSpacing = nan 5 6"),
    "spacing short": ("ElementSpacing = 5 5 6", "ElementSpacing = 5 5"),
    "spacing comma": ("ElementSpacing = 5 5 6", "ElementSpacing = 5,0 5,0 6,0"),
    "skewed": ("1 0 0 0 1 0 0 0 1", "1 0 0 0.5 1 0 0 0 1"),
    "no matrix": ("1 0 0 0 1 0 0 0 1", "0 0 0 0 0 0 0 0 0"),
    "scaled": ("1 0 0 0 1 0 0 0 1", "2 0 0 0 2 0 0 0 2"),
    "short matrix": ("1 0 0 0 1 0 0 0 1", "1 0 0"),
    "elsewhere": ("= LOCAL", "= /etc/passwd"),
    "list": ("= LOCAL", "= LIST"),
    "pattern": ("= LOCAL", "= %s%n.raw 0 1000000000 1"),
    "channels": ("ElementType", "ElementNumberOfChannels = 3\nElementType"),
    "text": ("BinaryData = True", "BinaryData = False"),
    "header size": ("ElementType", "HeaderSize = 1000\nElementType"),
    "unknown key": ("TransformMatrix", "TransfarmMatrix"),
    "twice": ("NDims = 3", "NDims = 3\nNDims = 3"),
    "not packed": ("CompressedData = False", "CompressedData = True"),
    "not text": ("NDims", "Gr\u00f6\u00dfe = 3\nNDims"),
    "long": ("NDims", "Comment = " + "A" * 100_000 + "\nNDims"),
}


@pytest.mark.parametrize("name", MHA)
def test_a_damaged_mha_header_is_refused(good: Good, tmp_path: Path, name: str) -> None:
    end = good.mha.index(b"LOCAL\n") + 6
    old, new = MHA[name]
    header = good.mha[:end].decode()
    assert old in header
    path = put(tmp_path / "x.mha", header.replace(old, new).encode() + good.mha[end:])
    assert str(path) in refused(path)


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nan": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 999, np.nan, v),
    "infinite": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 999, np.inf, v),
    "huge": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 999, 1e300, v),
    "40000": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 999, 40_000, v.astype(int)),
    "1024 added": lambda v: v + 1024,
    "1024 added and padded": lambda v: np.where(np.arange(64) < 9, -1024, v + 1024),
    "padded deeper": lambda v: np.where(np.arange(64) < 9, -2000, v + 1024),
    "8 bits": lambda v: ((v.clip(-1000, 999) + 1000) // 8).astype(np.uint8),
    "doubled": lambda v: v * 2,
    "no air": lambda v: v.clip(-300, None),
    "no tissue": lambda v: v.clip(None, 0),
    "constant": lambda v: v * 0,
    "five slices": lambda v: v[:5],
    "one slice": lambda v: v[:1],
    "a picture": lambda v: v[0],
}


@pytest.mark.parametrize("name", VALUES)
def test_what_is_no_chest_in_hu_is_refused(good: Good, tmp_path: Path, name: str) -> None:
    image = sitk.GetImageFromArray(VALUES[name](good.voxels))
    image.SetSpacing((5, 5, 6)[: image.GetDimension()])
    path = tmp_path / "x.nii"
    sitk.WriteImage(image, str(path))
    assert str(path) in refused(path)


@pytest.mark.parametrize("kind", ["nifti", "nifti tail", "nrrd", "mha"])
def test_what_unpacks_to_too_much_is_refused(good: Good, tmp_path: Path, kind: str) -> None:
    zeros = zlib.compressobj(1, zlib.DEFLATED, 31 if kind != "mha" else 15)
    body = [zeros.compress(bytes(2**22)) for _ in range(64)]
    if kind.startswith("nifti"):
        header = bytearray(good.nifti[:352])
        if kind == "nifti":
            struct.pack_into("<4h", header, 40, 3, 2048, 2048, 2048)
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        body = [packer.compress(bytes(header) + good.nifti[352:])]
        body += [packer.compress(bytes(2**22)) for _ in range(64)]
        path = put(tmp_path / "x.nii.gz", b"".join([*body, packer.flush()]))
    elif kind == "nrrd":
        end = good.nrrd_gz.index(b"\n\n") + 2
        path = put(tmp_path / "x.nrrd", good.nrrd_gz[:end] + b"".join([*body, zeros.flush()]))
    else:
        end = good.mha_z.index(b"LOCAL\n") + 6
        header_text = re.sub(rb"CompressedDataSize = \d+\n", b"", good.mha_z[:end])
        path = put(tmp_path / "x.mha", header_text + b"".join([*body, zeros.flush()]))
    assert str(path) in refused(path)


# --- paths -----------------------------------------------------------------------------------


@case
def missing(good: Good, folder: Path) -> Path:
    return folder / "no.nii"


@case
def unknown_type(good: Good, folder: Path) -> Path:
    return put(folder / "x.img", good.nifti)


@case
def wrong_suffix(good: Good, folder: Path) -> Path:
    return put(folder / "x.nrrd", good.nifti)


@case
def bzip2(good: Good, folder: Path) -> Path:
    return put(folder / "x.nii", b"BZh91AY" + bytes(1000))


@case
def broken_link(good: Good, folder: Path) -> Path:
    (folder / "x.nii").symlink_to(folder / "none")
    return folder / "x.nii"


@case
def link_to_itself(good: Good, folder: Path) -> Path:
    (folder / "x.nii").symlink_to(folder / "x.nii")
    return folder / "x.nii"


@case
def pipe(good: Good, folder: Path) -> Path:
    os.mkfifo(folder / "x.nii")
    return folder / "x.nii"


@case
def device(good: Good, folder: Path) -> Path:
    (folder / "x.nii").symlink_to("/dev/zero")
    return folder / "x.nii"


@case
def empty_folder(good: Good, folder: Path) -> Path:
    return folder


@case
def folder_of_other_files(good: Good, folder: Path) -> Path:
    put(folder / "x.nii", good.nifti)
    return folder


@case
def one_slice_alone(good: Good, folder: Path) -> Path:
    return put(folder / "x.dcm", good.slices[3])


@case
def too_many_files(good: Good, folder: Path) -> Path:
    put(folder / "f", b"")
    for index in range(20_001):
        os.link(folder / "f", folder / f"f{index}")
    return folder


def test_names_that_cannot_be_used_are_refused(good: Good, tmp_path: Path) -> None:
    put(tmp_path / "x.nii", good.nifti)
    for name in (b"caf\xe9.nii", b"a\nb.nii"):
        os.link(tmp_path / "x.nii", os.fsencode(tmp_path) + b"/" + name)
        message = refused(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        assert str(tmp_path) in message
        message.encode()
    assert "''" in refused("")
    assert "does not exist" in refused(str(tmp_path / "none"))
    assert "cannot be used" in refused(str(tmp_path) + "\0x")
    assert str(tmp_path) in refused(tmp_path / ("x" * 5000))
    for path in (None, 3, b"x.nii"):
        assert repr(path) in refused(path)  # type: ignore[arg-type]


def test_a_series_of_a_single_file_cannot_be_chosen(good: Good, tmp_path: Path) -> None:
    path = put(tmp_path / "x.nii", good.nifti)
    assert str(path) in refused(path, "1.2.3")


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("x.nii")
        assert str(tmp_path / "x.nii") in refused(tmp_path / "x.nii")


# --- DICOM series ----------------------------------------------------------------------------

VALUES_OF_TAGS: dict[str, list[bytes | None]] = {
    "Modality": [None, b"MR"],
    "ImagePositionPatient": [None, b"nan\\0\\0 ", b"0\\0 ", b"a\\b\\c ", b"1e15\\0\\0"],
    "ImageOrientationPatient": [
        None,
        b"0\\0\\0\\0\\0\\0 ",
        b"nan\\0\\0\\0\\1\\0 ",
        b"1\\0\\0\\.5\\1\\0",
    ],
    "PixelSpacing": [None, b"", b"0\\0 ", b"nan\\5 ", b"5 ", b"5\\5\\5 ", b"5,0\\5,0 ", b"-5\\-5"],
    "Rows": [None, struct.pack("<H", 32), struct.pack("<H", 128), struct.pack("<H", 65535)],
    "Columns": [None, struct.pack("<H", 32), struct.pack("<H", 128)],
    "BitsAllocated": [None, struct.pack("<H", 32)],
    "BitsStored": [None, struct.pack("<H", 8), struct.pack("<H", 12)],
    "HighBit": [struct.pack("<H", 7)],
    "PixelRepresentation": [None, struct.pack("<H", 7), struct.pack("<H", 0)],
    "SamplesPerPixel": [None, struct.pack("<H", 3)],
    "PhotometricInterpretation": [None, b"MONOCHROME1 "],
    "NumberOfFrames": [b"2 ", b"abc "],
    "RescaleSlope": [None, b"", b"0 ", b"nan ", b"abc ", b"-1", b"0.001 ", b"1e30"],
    "RescaleIntercept": [None, b"", b"inf ", b"abc ", b"100000", b"1e30", b"5000"],
    "PixelData": [None, b"", b"\0" * 100],
}


@pytest.mark.parametrize("one", [False, True], ids=["all", "last"])
@pytest.mark.parametrize(
    ("keyword", "value"), [(k, v) for k, values in VALUES_OF_TAGS.items() for v in values]
)
def test_a_damaged_tag_is_refused(
    good: Good, tmp_path: Path, keyword: str, value: bytes | None, one: bool
) -> None:
    def edit(dataset: pydicom.Dataset) -> None:
        if value is None:
            del dataset[keyword]
        elif keyword == "PixelData":
            dataset.PixelData = value
        else:
            raw(dataset, keyword, value)

    message = refused(edited(good, tmp_path, edit, one))
    assert str(tmp_path) in message
    if one:
        assert "039.dcm" in message


@pytest.mark.parametrize("kept", [0, 1, 100, 131, 132, 140, 300, 600, 900, 1100, 5000, -100, -1])
@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_a_cut_off_slice_is_noticed(good: Good, tmp_path: Path, kept: int, suffix: str) -> None:
    series(good, tmp_path, suffix)
    put(tmp_path / f"039{suffix}", good.slices[39][:kept])
    assert f"039{suffix}" in refused(tmp_path)


@case
def no_preamble(good: Good, folder: Path) -> Path:
    put(series(good, folder) / "039.dcm", good.slices[39][132:])
    return folder


@case
def link_to_a_slice_that_is_gone(good: Good, folder: Path) -> Path:
    series(good, folder)
    (folder / "039.dcm").unlink()
    (folder / "039.dcm").symlink_to(folder / "none")
    return folder


@case
def too_few_slices(good: Good, folder: Path) -> Path:
    for index in range(5, 40):
        (series(good, folder) if index == 5 else folder).joinpath(f"{index:03d}.dcm").unlink()
    return folder


@case
def a_gap(good: Good, folder: Path) -> Path:
    (series(good, folder) / "020.dcm").unlink()
    return folder


@case
def all_at_one_place(good: Good, folder: Path) -> Path:
    return edited(good, folder, lambda d: setattr(d, "ImagePositionPatient", [0, 0, 0]))


@case
def far_apart(good: Good, folder: Path) -> Path:
    def stretch(dataset: pydicom.Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, instance(dataset) * 2000]

    return edited(good, folder, stretch)


@case
def sliding_away(good: Good, folder: Path) -> Path:
    def slide(dataset: pydicom.Dataset) -> None:
        dataset.ImagePositionPatient = [instance(dataset) * 700, 0, instance(dataset) * 6]

    return edited(good, folder, slide)


@case
def jumping_sideways(good: Good, folder: Path) -> Path:
    def jump(dataset: pydicom.Dataset) -> None:
        dataset.ImagePositionPatient[0] += 3 * (instance(dataset) % 2)

    return edited(good, folder, jump)


@case
def acquisitions_that_interleave(good: Good, folder: Path) -> Path:
    def again_lower(dataset: pydicom.Dataset) -> None:
        dataset.AcquisitionNumber = 1 + (instance(dataset) > 32)
        dataset.ImagePositionPatient[2] -= 9 * (instance(dataset) > 32)

    return edited(good, folder, again_lower)


@case
def closer_than_any_scan(good: Good, folder: Path) -> Path:
    def squeeze(dataset: pydicom.Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, instance(dataset) * 0.05]

    return edited(good, folder, squeeze)


@case
def only_localizers(good: Good, folder: Path) -> Path:
    return edited(good, folder, lambda d: setattr(d, "ImageType", ["A", "B", "LOCALIZER"]))


@case
def a_localizer_among_the_slices(good: Good, folder: Path) -> Path:
    return edited(good, folder, lambda d: setattr(d, "ImageType", ["A", "B", "LOCALIZER"]), True)


@case
def a_table_of_hu(good: Good, folder: Path) -> Path:
    def replace(dataset: pydicom.Dataset) -> None:
        table = pydicom.Dataset()
        table.ModalityLUTType = "HU"
        dataset.ModalityLUTSequence = [table]

    return edited(good, folder, replace)


@case
def two_scans_nothing_tells_apart(good: Good, folder: Path) -> Path:
    series(good, folder)
    for index, data in enumerate(good.slices):
        dataset = pydicom.dcmread(BytesIO(data))
        dataset.PixelData = dataset.PixelData[::-1]
        put(folder / f"b{index:03d}.dcm", saved(dataset))
    return folder


@case
def two_scans_side_by_side(good: Good, folder: Path) -> Path:
    series(good, folder)
    for index, data in enumerate(good.slices):
        dataset = pydicom.dcmread(BytesIO(data))
        dataset.ImagePositionPatient[0] += 50
        put(folder / f"b{index:03d}.dcm", saved(dataset))
    return folder


def with_syntax(data: bytes, syntax: str) -> bytes:
    """A file that claims another transfer syntax than it has."""
    dataset = pydicom.dcmread(BytesIO(data))
    start = 144 + dataset.file_meta.FileMetaInformationGroupLength
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    stream = BytesIO()
    stream.write(bytes(128) + b"DICM")
    pydicom.filewriter.write_file_meta_info(stream, dataset.file_meta)
    return stream.getvalue() + data[start:]


@case
def unknown_compression(good: Good, folder: Path) -> Path:
    return put(series(good, folder) / "039.dcm", with_syntax(good.slices[39], "1.2.3.4")).parent


@case
def not_compressed_at_all(good: Good, folder: Path) -> Path:
    lie = with_syntax(good.slices[39], JPEGLosslessSV1)
    return put(series(good, folder) / "039.dcm", lie).parent


@case
def deflated_bomb(good: Good, folder: Path) -> Path:
    head = with_syntax(good.slices[0], DeflatedExplicitVRLittleEndian)
    start = 144 + pydicom.dcmread(BytesIO(good.slices[0])).file_meta.FileMetaInformationGroupLength
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    zeros = b"".join(packer.compress(bytes(2**22)) for _ in range(64)) + packer.flush()
    head = head[: len(head) - (len(good.slices[0]) - start)]
    return put(series(good, folder) / "bomb.dcm", head + zeros).parent


@case
def a_pixel_length_of_gigabytes(good: Good, folder: Path) -> Path:
    data = good.slices[39]
    place = data.rindex(b"\xe0\x7f\x10\x00OW")
    data = data[: place + 8] + struct.pack("<I", 0xD0000000) + data[place + 12 :]
    return put(series(good, folder) / "039.dcm", data).parent


@case
def a_header_length_of_gigabytes(good: Good, folder: Path) -> Path:
    data = good.slices[39]
    place = data.index(b"\x08\x00\x60\x00CS")
    data = data[:place] + b"\x08\x00\x58\x00UT\0\0\xf0\xff\xff\x7f" + data[place:]
    return put(series(good, folder) / "039.dcm", data).parent


@case
def nested_without_end(good: Good, folder: Path) -> Path:
    data = good.slices[39]
    start = data.index(b"\x08\x00\x08\x00CS")
    level = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return put(series(good, folder) / "039.dcm", data[:start] + level * 20_000).parent


@case
def half_a_jpeg(good: Good, folder: Path) -> Path:
    series(good, folder)
    dataset = pydicom.dcmread(BytesIO(good.slices[39]))
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xc3" + bytes(500)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return put(folder / "039.dcm", saved(dataset)).parent


# --- zip archives ----------------------------------------------------------------------------


def zipped(good: Good, folder: Path, **more: bytes) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index, data in enumerate(good.slices):
            archive.writestr(f"s/{index:03d}.dcm", data)
        for name, data in more.items():
            archive.writestr(name, data)
    return folder / "x.zip"


@case
def zip_that_climbs(good: Good, folder: Path) -> Path:
    return zipped(good, folder, **{"../../evil": b"x"})


@case
def zip_with_an_absolute_path(good: Good, folder: Path) -> Path:
    return zipped(good, folder, **{"/etc/evil": b"x"})


@case
def zip_with_a_drive(good: Good, folder: Path) -> Path:
    return zipped(good, folder, **{"C:\\evil": b"x"})


@case
def zip_bomb(good: Good, folder: Path) -> Path:
    return zipped(good, folder, zeros=bytes(2**26))


@case
def zip_with_a_large_member(good: Good, folder: Path) -> Path:
    return zipped(good, folder, zeros=bytes(2**26 + 1))


@case
def zip_of_many(good: Good, folder: Path) -> Path:
    return zipped(good, folder, **{f"e{index}": b"" for index in range(20_000)})


@case
def zip_of_nothing(good: Good, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w"):
        return folder / "x.zip"


@case
def zip_that_is_none(good: Good, folder: Path) -> Path:
    return put(folder / "x.zip", b"hello " * 100)


@case
def zip_cut_off(good: Good, folder: Path) -> Path:
    path = zipped(good, folder)
    return put(path, path.read_bytes()[:50_000])


@case
def zip_with_a_flipped_bit(good: Good, folder: Path) -> Path:
    path = zipped(good, folder)
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    return put(path, bytes(data))


@case
def zip_with_a_lying_size(good: Good, folder: Path) -> Path:
    path = zipped(good, folder)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, place + 24, 1000)
    return put(path, bytes(data))


@case
def zip_with_a_link(good: Good, folder: Path) -> Path:
    path = zipped(good, folder)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("s/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return path


def test_a_locked_zip_is_named_so(good: Good, tmp_path: Path) -> None:
    path = zipped(good, tmp_path)
    data = bytearray(path.read_bytes())
    for found in re.finditer(b"PK\1\2", bytes(data)):
        data[found.start() + 8] |= 1
    message = refused(put(path, bytes(data)))
    assert str(path) in message
    assert "password" in message


# --- the released format ---------------------------------------------------------------------


def volume(good: Good, folder: Path, edit: Callable[[pydicom.Dataset], object]) -> Path:
    dataset = pydicom.dcmread(BytesIO(good.volume))
    edit(dataset)
    return put(folder / "v.dcm", saved(dataset))


def set_frames(dataset: pydicom.Dataset, edit: Callable[[list[bytes]], list[bytes]]) -> None:
    frames = edit(list(generate_frames(dataset.PixelData, number_of_frames=40)))
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].is_undefined_length = True


def png(values: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


FRAMES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "lost": lambda frames: frames[:-1],
    "one more": lambda frames: [*frames, frames[0]],
    "8 bits": lambda frames: [*frames[1:], png(np.zeros((64, 64), np.uint8))],
    "colours": lambda frames: [*frames[1:], png(np.zeros((64, 64, 3), np.uint8))],
    "larger": lambda frames: [*frames[1:], png(np.zeros((65, 64), np.uint16))],
    "all larger": lambda frames: [png(np.full((70, 70), 900, np.uint16))] * 40,
    "a bomb": lambda frames: [*frames[1:], png(np.zeros((9000, 9000), np.uint16))],
    "bombs": lambda frames: [png(np.zeros((4096, 4096), np.uint16))] * 40,
    "cut": lambda frames: [*frames[1:], frames[0][:200]],
    "no picture": lambda frames: [*frames[1:], b"hello!"],
}


@pytest.mark.parametrize("name", FRAMES)
def test_damaged_frames_of_a_volume_are_refused(good: Good, tmp_path: Path, name: str) -> None:
    path = volume(good, tmp_path, lambda dataset: set_frames(dataset, FRAMES[name]))
    assert str(path) in refused(path)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("NumberOfFrames", b"0 "),
        ("NumberOfFrames", b"39"),
        ("NumberOfFrames", b"40000000"),
        ("NumberOfFrames", b"-1"),
        ("Rows", struct.pack("<H", 65)),
        ("PixelSpacing", b"nan\\5 "),
        ("PixelSpacing", b"0\\0 "),
        ("PixelSpacing", b"5 "),
        ("SpacingBetweenSlices", b"-6"),
        ("SpacingBetweenSlices", b"nan "),
        ("ImagePositionPatient", b"nan\\0\\0 "),
        ("ImagePositionPatient", b"1\\2 "),
        ("ImageOrientationPatient", b"0\\0\\0\\0\\0\\0 "),
        ("ImageOrientationPatient", b"2\\0\\0\\0\\2\\0 "),
        ("ImageOrientationPatient", b"1\\0\\0\\.5\\1\\0"),
        ("RescaleSlope", b"2 "),
        ("RescaleIntercept", b"0 "),
        ("RescaleIntercept", b"nan "),
    ],
)
def test_damaged_tags_of_a_volume_are_refused(
    good: Good, tmp_path: Path, keyword: str, value: bytes
) -> None:
    path = volume(good, tmp_path, lambda dataset: raw(dataset, keyword, value))
    assert str(path) in refused(path)


# --- all the named cases ---------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_scan_is_refused(good: Good, tmp_path: Path, name: str) -> None:
    path = CASES[name](good, tmp_path)
    assert str(path) in refused(path)


# --- real scans ------------------------------------------------------------------------------


@pytest.fixture
def real(good: Good) -> Path:
    """The folder of real scans; skip without it, but fail where it must be there."""
    if not good.real.is_dir():
        reason = "no real scans: COVIDMTL_TEST_CT does not name their folder"
        if os.environ.get("COVIDMTL_REQUIRE_DATA"):
            pytest.fail(reason)
        pytest.skip(reason)
    return good.real


@pytest.mark.parametrize("kept", [1000, 50_000, 100_000, -9, -8, -100, -20_000])
def test_a_cut_off_jpeg_slice_is_noticed(real: Path, tmp_path: Path, kept: int) -> None:
    """Slices of real scans are compressed."""
    files = sorted((real / "covid-ct-md-P002-dicom").iterdir())[20:116:4]
    for file in files:
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / files[-1].name).unlink()
    put(tmp_path / files[-1].name, files[-1].read_bytes()[:kept])
    assert files[-1].name in refused(tmp_path)


@pytest.mark.parametrize("kept", [0.5, 0.99, -9, -1])
def test_a_cut_off_real_file_is_refused(real: Path, tmp_path: Path, kept: float) -> None:
    data = (real / "covid-ct-md-normal001.nii.gz").read_bytes()
    length = int(kept * len(data)) if isinstance(kept, float) else kept
    path = put(tmp_path / "x.nii.gz", data[:length])
    assert str(path) in refused(path)


def test_a_flipped_bit_in_a_real_file_is_noticed(real: Path, tmp_path: Path) -> None:
    data = bytearray((real / "covid-ct-md-normal001.nii.gz").read_bytes())
    data[len(data) // 2] ^= 4
    path = put(tmp_path / "x.nii.gz", bytes(data))
    assert str(path) in refused(path)
