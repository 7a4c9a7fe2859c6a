"""Reading a chest CT of any kind in HU, resampling, and the paper's own volume format."""

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from covidmtl_core import ct, phantom
from covidmtl_core.errors import DataError, DataWarning, ParameterError

GRIDS = {
    "straight": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "prone": (-1, 0, 0, 0, -1, 0, 0, 0, 1),
    "left-handed": (-1, 0, 0, 0, 1, 0, 0, 0, 1),
    "feet up": (1, 0, 0, 0, 1, 0, 0, 0, -1),
    "oblique": sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.5).GetMatrix(),
}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> sitk.Image:
    """A synthetic thorax, made once for all modules that name it so."""
    made = tmp_path_factory.getbasetemp() / "scan.mha"
    if not made.exists():
        patient = phantom.draw_patient(3, 0.2, noise=3.0)
        image = phantom.make_phantom(patient, size=[40, 64, 80], spacing_mm=[6, 5, 4]).image
        sitk.WriteImage(image, str(made))
    return sitk.ReadImage(str(made))


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """The folder of real scans; skip without it, but fail where it must be there."""
    folder = Path(os.environ.get("COVIDMTL_TEST_CT") or "/nonexistent")
    if not folder.is_dir():
        reason = "no real scans: COVIDMTL_TEST_CT does not name their folder"
        if os.environ.get("COVIDMTL_REQUIRE_DATA"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def turned(image: sitk.Image, grid: str) -> sitk.Image:
    image = sitk.Image(image)
    image.SetDirection(GRIDS[grid])
    image.SetOrigin((-101.5, 33.25, -80.0))
    return image


def assert_same(got: sitk.Image, wanted: sitk.Image, tolerance_mm: float = 1e-3) -> None:
    """Same voxels in the same places."""
    assert got.GetSize() == wanted.GetSize()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(wanted))
    for corner in np.ndindex(2, 2, 2):
        index = [int(c * (n - 1)) for c, n in zip(corner, wanted.GetSize(), strict=True)]
        np.testing.assert_allclose(
            got.TransformIndexToPhysicalPoint(index),
            wanted.TransformIndexToPhysicalPoint(index),
            atol=tolerance_mm,
        )


def assert_same_places(got: sitk.Image, wanted: sitk.Image) -> None:
    """Same values at the same physical points, whatever the order of the voxels."""
    again = sitk.Resample(got, wanted, sitk.Transform(), sitk.sitkNearestNeighbor, -9999)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(wanted))


# --- single files ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("x.nii", False),
        ("x.nii.gz", True),
        ("X.NII.GZ", True),
        ("x.nrrd", False),
        ("x.nrrd", True),
        ("x.mha", False),
        ("x.mha", True),
    ],
)
def test_a_file_reads_as_simpleitk_reads_it(
    scan: sitk.Image, tmp_path: Path, name: str, packed: bool, grid: str
) -> None:
    image = turned(scan, grid)
    path = tmp_path / name.lower()
    sitk.WriteImage(image, str(path), packed)
    theirs = sitk.ReadImage(str(path))
    path = path.rename(tmp_path / name)
    got = ct.read_ct(path)
    assert got.GetPixelID() == sitk.sitkInt16
    assert got.GetMetaDataKeys() == ()
    assert_same(got, image)
    assert_same(got, theirs)


@pytest.mark.parametrize("name", ["x.nii", "x.nrrd", "x.mha"])
@pytest.mark.parametrize("pixel", [sitk.sitkInt32, sitk.sitkInt64, sitk.sitkFloat64])
def test_whole_numbers_of_any_type_become_int16(
    scan: sitk.Image, tmp_path: Path, name: str, pixel: int
) -> None:
    sitk.WriteImage(sitk.Cast(scan, pixel), str(tmp_path / name))
    got = ct.read_ct(tmp_path / name)
    assert got.GetPixelID() == sitk.sitkInt16
    assert_same(got, scan)


def test_fractions_are_kept(scan: sitk.Image, tmp_path: Path) -> None:
    image = sitk.Cast(scan, sitk.sitkFloat32) + 0.25
    sitk.WriteImage(image, str(tmp_path / "x.nii"))
    got = ct.read_ct(tmp_path / "x.nii")
    assert got.GetPixelID() == sitk.sitkFloat32
    assert_same(got, sitk.Maximum(image, -1024))


def test_a_fourth_dimension_of_one_is_dropped(scan: sitk.Image, tmp_path: Path) -> None:
    for name in ("x.nii", "x.mha"):
        sitk.WriteImage(sitk.JoinSeries([scan]), str(tmp_path / name))
        assert_same(ct.read_ct(tmp_path / name), scan)


def test_padding_becomes_air(scan: sitk.Image, tmp_path: Path) -> None:
    voxels = sitk.GetArrayFromImage(scan)
    voxels[:, :6], voxels[:, -6:] = -2000, -3024
    image = sitk.GetImageFromArray(voxels)
    image.CopyInformation(scan)
    sitk.WriteImage(image, str(tmp_path / "x.nii"))
    got = sitk.GetArrayFromImage(ct.read_ct(tmp_path / "x.nii"))
    np.testing.assert_array_equal(got, np.maximum(voxels, ct.AIR))


def edit_nifti(scan: sitk.Image, path: Path, edit: Callable[[bytearray], None]) -> Path:
    sitk.WriteImage(scan, str(path))
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    return path


def test_nifti_rescaling_is_applied(scan: sitk.Image, tmp_path: Path) -> None:
    def store(data: bytearray) -> None:
        data[352:] = (np.frombuffer(bytes(data[352:]), "<i2") + 1024).astype("<i2").tobytes()
        struct.pack_into("<2f", data, 112, 1, -1024)

    assert_same(ct.read_ct(edit_nifti(scan, tmp_path / "x.nii", store)), scan)


def test_a_nifti_slope_of_zero_means_none(scan: sitk.Image, tmp_path: Path) -> None:
    path = edit_nifti(scan, tmp_path / "x.nii", lambda d: struct.pack_into("<2f", d, 112, 0, 99))
    assert_same(ct.read_ct(path), scan)


@pytest.mark.parametrize("dropped", [252, 254], ids=["qform", "sform"])
def test_either_nifti_geometry_suffices(scan: sitk.Image, tmp_path: Path, dropped: int) -> None:
    image = turned(scan, "oblique")
    path = edit_nifti(image, tmp_path / "x.nii", lambda d: struct.pack_into("<h", d, dropped, 0))
    assert_same(ct.read_ct(path), image, 2e-3)


def test_nifti_in_metres(scan: sitk.Image, tmp_path: Path) -> None:
    def to_metres(data: bytearray) -> None:
        data[123] = 1
        for start, count in ((80, 3), (268, 3), (280, 12)):
            values = np.frombuffer(bytes(data), "<f4", count, start) / 1000
            struct.pack_into(f"<{count}f", data, start, *values)

    assert_same(ct.read_ct(edit_nifti(scan, tmp_path / "x.nii", to_metres)), scan, 1e-2)


def test_a_big_endian_nifti(scan: sitk.Image, tmp_path: Path) -> None:
    def swap(data: bytearray) -> None:
        fields = [(0, "i4", 1), (40, "i2", 8), (68, "i2", 4), (76, "f4", 11), (252, "i2", 2)]
        for start, kind, count in [*fields, (256, "f4", 18), (352, "i2", (len(data) - 352) // 2)]:
            values = np.frombuffer(bytes(data), f"<{kind}", count, start)
            data[start : start + values.nbytes] = values.astype(f">{kind}").tobytes()

    path = edit_nifti(scan, tmp_path / "x.nii", swap)
    assert_same(sitk.ReadImage(str(path)), scan)
    assert_same(ct.read_ct(path), scan)


def nrrd(path: Path, scan: sitk.Image, space: str, order: str = "<", sign: tuple = (1, 1)) -> Path:
    (sx, sy, sz), (ox, oy, oz) = scan.GetSpacing(), scan.GetOrigin()
    endian = "little" if order == "<" else "big"
    header = (
        f"NRRD0004\n# made by hand\ntype: int16\ndimension: 3\nendian: {endian}\nencoding: raw\n"
        f"{space}sizes: {' '.join(map(str, scan.GetSize()))}\n"
        f"space directions: ({sx * sign[0]},0,0) (0,{sy * sign[1]},0) (0,0,{sz})\n"
        f"space origin: ({ox * sign[0]},{oy * sign[1]},{oz})\nnote:=nothing\n\n"
    )
    path.write_bytes(header.encode() + sitk.GetArrayFromImage(scan).astype(f"{order}i2").tobytes())
    return path


@pytest.mark.parametrize(
    ("space", "sign"),
    [("left-posterior-superior", (1, 1)), ("RAS", (-1, -1)), ("left-anterior-superior", (1, -1))],
)
def test_nrrd_spaces(scan: sitk.Image, tmp_path: Path, space: str, sign: tuple) -> None:
    path = nrrd(tmp_path / "x.nrrd", scan, f"space: {space}\n", ">", sign)
    assert_same(ct.read_ct(path), scan)


def test_an_unsaid_orientation_warns(scan: sitk.Image, tmp_path: Path) -> None:
    none = edit_nifti(scan, tmp_path / "x.nii", lambda d: struct.pack_into("<2h", d, 252, 0, 0))
    with pytest.warns(DataWarning, match="right and left"):
        got = ct.read_ct(none)
    assert got.GetSpacing() == pytest.approx(scan.GetSpacing())
    with pytest.warns(DataWarning, match="right and left"):
        got = ct.read_ct(nrrd(tmp_path / "x.nrrd", scan, "space dimension: 3\n"))
    assert_same(got, scan)
    sitk.WriteImage(scan, str(tmp_path / "x.mha"))
    data = (tmp_path / "x.mha").read_bytes()
    line = next(part for part in data.split(b"\n") if part.startswith(b"TransformMatrix"))
    (tmp_path / "x.mha").write_bytes(data.replace(line + b"\n", b""))
    with pytest.warns(DataWarning, match="right and left"):
        got = ct.read_ct(tmp_path / "x.mha")
    assert_same(got, scan)


def test_names_of_every_alphabet_are_read(scan: sitk.Image, tmp_path: Path) -> None:
    path = tmp_path / "患者 ü.nii.gz"
    sitk.WriteImage(scan, str(tmp_path / "x.nii.gz"))
    (tmp_path / "x.nii.gz").rename(path)
    assert_same(ct.read_ct(path), scan)
    assert_same(ct.read_ct(str(path)), scan)


def test_the_paper_scale_is_told_apart(scan: sitk.Image, tmp_path: Path) -> None:
    sitk.WriteImage(ct.to_paper(scan), str(tmp_path / "x.nii"))
    with pytest.raises(DataError, match="from_paper"):
        ct.read_ct(tmp_path / "x.nii")
    read = ct.from_paper(sitk.ReadImage(str(tmp_path / "x.nii")))
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(read), np.maximum(sitk.GetArrayFromImage(scan), -1024)
    )


def test_real_files_read_as_simpleitk_reads_them(real_scans: Path) -> None:
    files = [real_scans / "covid-ct-md-normal001.nii.gz", real_scans / "cip-ct-64" / "ct-64.nrrd"]
    for path in files:
        theirs = sitk.ReadImage(str(path))
        assert_same(ct.read_ct(path), sitk.Maximum(theirs, ct.AIR), 1e-4)


def test_a_real_series_reads_as_simpleitk_reads_it(real_scans: Path) -> None:
    folder = real_scans / "covid-ct-md-P002-dicom"
    start = time.perf_counter()
    got = ct.read_ct(folder)
    assert time.perf_counter() - start < 10
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    assert_same(got, sitk.Maximum(sitk.ReadImage(files), ct.AIR))


# --- resampling ------------------------------------------------------------------------------


def ramp(direction: tuple[float, ...], axis: int) -> tuple[sitk.Image, np.ndarray]:
    """An image whose values are 4 times the coordinate in mm."""
    image = sitk.Image([30, 25, 20], sitk.sitkInt16)
    image.SetSpacing((4, 3, 6))
    image.SetOrigin((-60, -40, -60))
    image.SetDirection(direction)
    values = 4 * places(image)[axis]
    filled = sitk.GetImageFromArray(values.round().astype(np.int16))
    filled.CopyInformation(image)
    return filled, values


def places(image: sitk.Image) -> np.ndarray:
    """Coordinates (3, z, y, x) of the voxels."""
    k, j, i = np.meshgrid(*(np.arange(n) for n in image.GetSize()[::-1]), indexing="ij")
    matrix = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    points = matrix @ np.stack([i.ravel(), j.ravel(), k.ravel()])
    return (points + np.array(image.GetOrigin())[:, None]).reshape(3, *image.GetSize()[::-1])


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("grid", ["straight", "left-handed", "oblique"])
@pytest.mark.parametrize("spacing", [2.0, (1.5, 2.5, 7.0), 9.0])
def test_resampling_keeps_every_place(spacing: object, grid: str, interpolation: str) -> None:
    for axis in range(3):
        image, _ = ramp(GRIDS[grid], axis)
        done = ct.resample(image, spacing, interpolation)  # type: ignore[arg-type]
        error = sitk.GetArrayFromImage(done) - 4 * places(done)[axis]
        # Near the faces a spline knows nothing of what lies beyond.
        ratio = np.array(image.GetSpacing()) / done.GetSpacing()
        z, y, x = (int(np.ceil(3 * part)) for part in ratio[::-1])
        inner = error[z:-z, y:-y, x:-x]
        assert np.abs(inner).max() < 1.5  # 0.4 mm
        assert abs(inner.mean()) < 0.1


def test_resampling_keeps_the_outer_faces() -> None:
    image, _ = ramp(GRIDS["oblique"], 0)
    done = ct.resample(image, 2.3, "linear")
    for side in (-0.5, 1):
        faces = [
            made.TransformContinuousIndexToPhysicalPoint(
                [side if side < 0 else n - 0.5 for n in made.GetSize()]
            )
            for made in (image, done)
        ]
        np.testing.assert_allclose(*faces, atol=1e-6)


def test_resampling_whole_numbers_rounds(scan: sitk.Image) -> None:
    """Cutting off the fractions would shift the mean by half a HU towards zero."""
    exact = ct.resample(sitk.Cast(scan, sitk.sitkFloat64), 3.1, "linear")
    whole = ct.resample(scan, 3.1, "linear")
    assert whole.GetPixelID() == sitk.sitkInt16
    gap = sitk.GetArrayFromImage(whole) - sitk.GetArrayFromImage(exact)
    assert np.abs(gap).max() < 0.51
    assert abs(gap.mean()) < 0.02


def test_cubic_resampling_stays_in_range(scan: sitk.Image) -> None:
    values = sitk.GetArrayFromImage(ct.resample(scan, 2.2))
    stored = sitk.GetArrayFromImage(scan)
    assert stored.min() <= values.min() < values.max() <= stored.max()


def test_resampling_labels_makes_no_new_ones() -> None:
    labels = sitk.Image([20, 20, 20], sitk.sitkUInt8)
    labels[5:12, 5:12, 5:12] = 7
    labels[12:15, 5:12, 5:12] = 3
    done = ct.resample(labels, 0.6, "nearest")
    assert done.GetPixelID() == sitk.sitkUInt8
    assert set(np.unique(sitk.GetArrayFromImage(done))) == {0, 3, 7}


@pytest.mark.parametrize("spacing", [0, -1, float("nan"), "abc", (1, 2), None, 1e-6])
def test_resampling_refuses_a_wrong_spacing(spacing: object) -> None:
    with pytest.raises(ParameterError):
        ct.resample(sitk.Image([20, 20, 20], sitk.sitkInt16), spacing)  # type: ignore[arg-type]


def test_resampling_refuses_other_images() -> None:
    for image in (
        sitk.Image([20, 20], sitk.sitkInt16),
        sitk.Image([20, 20, 20], sitk.sitkVectorInt16, 2),
        np.zeros((20, 20, 20)),
    ):
        with pytest.raises(ParameterError):
            ct.resample(image, 2.0)
    with pytest.raises(ParameterError, match="lanczos"):
        ct.resample(sitk.Image([20, 20, 20], sitk.sitkInt16), 2.0, "lanczos")  # type: ignore[arg-type]


# --- the paper's scale and format ------------------------------------------------------------


def test_the_paper_scale_and_back() -> None:
    image = sitk.GetImageFromArray(np.array([[[-3000, -1024, -700, 0, 3071, 9000]]], np.int16))
    paper = ct.to_paper(image)
    assert sitk.GetArrayFromImage(paper).ravel().tolist() == [0, 0, 324, 1024, 4095, 4095]
    back = sitk.GetArrayFromImage(ct.from_paper(paper)).ravel().tolist()
    assert back == [-1024, -1024, -700, 0, 3071, 3071]


@pytest.mark.parametrize("grid", ["straight", "prone", "oblique"])
def test_a_volume_round_trip(scan: sitk.Image, tmp_path: Path, grid: str) -> None:
    image = sitk.Maximum(turned(scan, grid), -1024)
    ct.write_volume(image, tmp_path / "v")
    assert_same(ct.read_volume(tmp_path / "v"), image)
    assert_same(ct.read_ct(tmp_path / "v"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("grid", ["left-handed", "feet up"])
def test_a_left_handed_volume_keeps_its_places(scan: sitk.Image, tmp_path: Path, grid: str) -> None:
    image = turned(scan, grid)
    ct.write_volume(image, tmp_path / "v")
    assert_same_places(ct.read_volume(tmp_path / "v"), image)


def test_a_volume_keeps_values_beyond_int16(tmp_path: Path) -> None:
    values = np.full((3, 4, 5), 64_511, np.int32)
    values[1] = -1024
    ct.write_volume(sitk.GetImageFromArray(values), tmp_path / "v")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ct.read_volume(tmp_path / "v")), values)


@pytest.mark.parametrize("value", [-1025, 64_512, 0.5, float("nan"), float("inf"), 1e300])
def test_write_volume_refuses_what_it_cannot_keep(tmp_path: Path, value: float) -> None:
    values = np.zeros((3, 4, 5))
    values[1, 2, 3] = value
    with pytest.raises(ParameterError, match="cannot be kept"):
        ct.write_volume(sitk.GetImageFromArray(values), tmp_path / "v")
    with pytest.raises(ParameterError, match="3D"):
        ct.write_volume(sitk.Image([4, 4], sitk.sitkInt16), tmp_path / "v")
    assert not list(tmp_path.iterdir())
