"""DICOM series: which slices make a volume, and in which geometry."""

import os
import tempfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import ImplicitVRLittleEndian, RLELossless

from covidmtl_core import ct, dicom, phantom
from covidmtl_core.errors import DataError, DataWarning, ParameterError

Edit = Callable[[pydicom.Dataset, int], bool | None]


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> sitk.Image:
    """A synthetic thorax, made once for all modules that name it so."""
    made = tmp_path_factory.getbasetemp() / "scan.mha"
    if not made.exists():
        patient = phantom.draw_patient(3, 0.2, noise=3.0)
        image = phantom.make_phantom(patient, size=[40, 64, 80], spacing_mm=[6, 5, 4]).image
        sitk.WriteImage(image, str(made))
    return sitk.ReadImage(str(made))


@pytest.fixture(scope="module")
def other_scan(scan: sitk.Image) -> sitk.Image:
    """Another scan in the same grid: the mirror image."""
    other = sitk.GetImageFromArray(sitk.GetArrayFromImage(scan)[:, :, ::-1].copy())
    other.CopyInformation(scan)
    return other


def series(scan: sitk.Image, folder: Path, edit: Edit | None = None, start: int = 0) -> Path:
    """Write a series as 000.dcm ... in the slices' order, without those `edit` says False to."""
    for index, data in enumerate(slices_of(scan)):
        dataset = pydicom.dcmread(BytesIO(data))
        if edit is None or edit(dataset, index) is not False:
            dataset.save_as(folder / f"{start + index:03d}.dcm")
    return folder


def slices_of(
    scan: sitk.Image,
    known: dict[int, tuple[sitk.Image, list[bytes]]] = {},  # noqa: B006
) -> list[bytes]:
    """The files of a scan in the slices' order, written once."""
    if id(scan) not in known:
        with tempfile.TemporaryDirectory() as folder:
            dicom.write_series(scan, Path(folder))
            data = [file.read_bytes() for file in Path(folder).iterdir()]
        data.sort(key=lambda part: int(pydicom.dcmread(BytesIO(part)).InstanceNumber))
        known[id(scan)] = scan, data
    return known[id(scan)][1]


def tagged(**values: Any) -> Edit:
    def edit(dataset: pydicom.Dataset, _: int) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return edit


def with_step(scan: sitk.Image, step: float) -> sitk.Image:
    scan = sitk.Image(scan)
    scan.SetSpacing((*scan.GetSpacing()[:2], step))
    return scan


def assert_same(got: sitk.Image, wanted: sitk.Image) -> None:
    assert got.GetSize() == wanted.GetSize()
    np.testing.assert_allclose(got.GetOrigin(), wanted.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(got.GetSpacing(), wanted.GetSpacing(), atol=1e-4)
    np.testing.assert_allclose(got.GetDirection(), wanted.GetDirection(), atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(wanted))


def assert_same_places(got: sitk.Image, wanted: sitk.Image) -> None:
    again = sitk.Resample(got, wanted, sitk.Transform(), sitk.sitkNearestNeighbor, -9999)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(wanted))


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("angles", [(0, 0, 0), (0.3, -0.2, 0.5), (0, 0, np.pi)])
def test_round_trip(scan: sitk.Image, tmp_path: Path, angles: tuple[float, ...]) -> None:
    image = sitk.Image(scan)
    image.SetDirection(sitk.Euler3DTransform((0, 0, 0), *angles).GetMatrix())
    image.SetOrigin((150.123, -60.5, -90.25))
    dicom.write_series(image, tmp_path / "s")
    assert_same(ct.read_ct(tmp_path / "s"), image)


@pytest.mark.parametrize("mirrored", [(-1, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_a_left_handed_image_keeps_its_places(
    scan: sitk.Image, tmp_path: Path, mirrored: tuple[int, ...]
) -> None:
    image = sitk.Image(scan)
    image.SetDirection(np.diag(mirrored).astype(float).ravel().tolist())
    dicom.write_series(image, tmp_path / "s")
    assert_same_places(ct.read_ct(tmp_path / "s"), image)


def test_simpleitk_reads_the_same(scan: sitk.Image, tmp_path: Path) -> None:
    series(scan, tmp_path, tagged(RescaleIntercept=-24, RescaleSlope=1))
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    theirs = sitk.ReadImage(files)
    got = ct.read_ct(tmp_path)
    assert_same(got, sitk.Maximum(sitk.Cast(theirs, sitk.sitkInt16), ct.AIR))


@pytest.mark.parametrize("syntax", ["implicit", "RLE", "12 bits", "unsigned"])
def test_ways_to_store_pixels(scan: sitk.Image, tmp_path: Path, syntax: str) -> None:
    def edit(dataset: pydicom.Dataset, _: int) -> None:
        values = np.frombuffer(dataset.PixelData, "<i2").astype(int) + 1024
        if syntax == "12 bits":
            dataset.BitsStored, dataset.HighBit = 12, 11
        elif syntax == "unsigned":
            dataset.PixelRepresentation, dataset.RescaleIntercept = 0, -1024
            dataset.PixelData = values.astype("<u2").tobytes()
        elif syntax == "RLE":
            dataset.compress(RLELossless)
        else:
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    series(scan, tmp_path)
    for file in tmp_path.iterdir():
        dataset = pydicom.dcmread(file)
        edit(dataset, 0)
        implicit = syntax == "implicit"
        pydicom.dcmwrite(
            file, dataset, implicit_vr=implicit, little_endian=True
        ) if implicit else dataset.save_as(file)
    assert_same(ct.read_ct(tmp_path), scan)


@pytest.mark.parametrize("value", [-40_000, 40_000, 0.5, float("nan")])
def test_write_series_refuses_what_it_cannot_keep(tmp_path: Path, value: float) -> None:
    values = np.zeros((3, 4, 5))
    values[1, 2, 3] = value
    with pytest.raises(ParameterError, match="cannot be kept"):
        dicom.write_series(sitk.GetImageFromArray(values), tmp_path / "s")
    with pytest.raises(ParameterError, match="dimensions"):
        dicom.write_series(sitk.Image([4, 4], sitk.sitkInt16), tmp_path / "s")
    assert not (tmp_path / "s").exists()


# --- files -----------------------------------------------------------------------------------


def test_order_names_and_neighbours_do_not_matter(scan: sitk.Image, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deeper"
    folder.mkdir(parents=True)
    series(scan, folder)
    for number, file in enumerate(sorted(folder.iterdir(), key=lambda f: f.name[::-1])):
        file.rename(folder / f"IM_{number}" if number % 2 else tmp_path / "in" / f"{number}.ima")
    (folder / "README").write_text("not DICOM")
    (folder / "._IM_1").write_bytes(b"\0\5\x16\7" + bytes(100))
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (folder / "loop").symlink_to(tmp_path / "in")
    os.mkfifo(folder / "pipe.dcm")
    assert_same(ct.read_ct(tmp_path / "in"), scan)


def test_links_are_followed(scan: sitk.Image, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "links").mkdir()
    for index, file in enumerate(sorted(series(scan, tmp_path / "s").iterdir())):
        if index % 2:
            (tmp_path / "links" / file.name).symlink_to(file)
        else:
            file.rename(tmp_path / "links" / file.name)
    assert_same(ct.read_ct(tmp_path / "links"), scan)


def zipped(folder: Path, path: Path, prefix: str = "patient/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
            archive.writestr(f"__MACOSX/._{file.name}", b"\0\5\x16\7")
    return path


@pytest.mark.parametrize("prefix", ["patient/", "a\\b\\", "2020-01-01 10:30/", "患者/a..b/"])
def test_a_zip_archive(scan: sitk.Image, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "s").mkdir()
    series(scan, tmp_path / "s")
    assert_same(ct.read_ct(zipped(tmp_path / "s", tmp_path / "x.zip", prefix)), scan)


def test_a_damaged_member_is_named_as_in_the_archive(scan: sitk.Image, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    file = series(scan, tmp_path / "s") / "020.dcm"
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"patient/020\.dcm"):
        ct.read_ct(zipped(tmp_path / "s", tmp_path / "x.zip"))


# --- which series ----------------------------------------------------------------------------


def two_series(one: sitk.Image, two: sitk.Image, folder: Path, first: Edit, second: Edit) -> Path:
    series(one, folder, first)
    return series(two, folder, second, start=100)


def test_the_series_with_most_slices_is_taken(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    def fewer(dataset: pydicom.Dataset, index: int) -> bool:
        dataset.SeriesInstanceUID = "1.2.3"
        return index < 30

    two_series(scan, other_scan, tmp_path, tagged(), fewer)
    assert_same(ct.read_ct(tmp_path), scan)
    assert_same(ct.read_ct(tmp_path, "1.2.3"), other_scan[:, :, :30])


def test_among_equals_the_thinner_slices_are_taken(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    thick = tagged(SeriesInstanceUID="1.2.3", SliceThickness=8)
    two_series(scan, other_scan, tmp_path, thick, tagged(SeriesInstanceUID="1.2.4"))
    assert_same(ct.read_ct(tmp_path), other_scan)


def test_a_series_is_chosen_by_uid_number_or_description(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    two_series(
        scan,
        other_scan,
        tmp_path,
        tagged(SeriesInstanceUID="1.2.3", SeriesNumber=4, SeriesDescription="Lung"),
        tagged(SeriesInstanceUID="1.2.4", SeriesNumber=5, SeriesDescription="Soft"),
    )
    for choice in ("1.2.4", 5, "5", "Soft", " Soft "):
        assert_same(ct.read_ct(tmp_path, choice), other_scan)
    for choice in ("1.2.5", 6, "", "Lun"):
        with pytest.raises(ParameterError, match=r"number 4, Lung, 40 slices, UID 1\.2\.3"):
            ct.read_ct(tmp_path, choice)
    for choice in (4.0, True):
        with pytest.raises(ParameterError):
            ct.read_ct(tmp_path, choice)  # type: ignore[arg-type]


def test_a_choice_that_fits_several_series_is_refused(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    one, two = tagged(SeriesInstanceUID="1.2.3"), tagged(SeriesInstanceUID="1.2.4")
    two_series(scan, other_scan, tmp_path, one, two)
    with pytest.raises(ParameterError, match=r"not unique.*1\.2\.3.*1\.2\.4"):
        ct.read_ct(tmp_path, 1)


def test_localizers_and_other_modalities_are_left_aside(scan: sitk.Image, tmp_path: Path) -> None:
    series(scan, tmp_path)
    localizer = pydicom.dcmread(tmp_path / "003.dcm")
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    localizer.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    localizer.save_as(tmp_path / "localizer.dcm")
    report = pydicom.dcmread(tmp_path / "003.dcm")
    report.Modality, report.SeriesInstanceUID = "SR", "1.2.3"
    report.save_as(tmp_path / "report.dcm")
    assert_same(ct.read_ct(tmp_path), scan)


@pytest.mark.parametrize("uid", ["", "09bc8aea-ff9c-4106", "Größe 1/2", "--5"])
def test_messy_identifiers(scan: sitk.Image, tmp_path: Path, uid: str) -> None:
    def edit(dataset: pydicom.Dataset, _: int) -> None:
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            dataset[keyword].value = uid
        dataset.SeriesDescription = uid
        dataset.SpecificCharacterSet = "ISO_IR 192"
        del dataset.SeriesNumber

    assert_same(ct.read_ct(series(scan, tmp_path, edit)), scan)


def test_series_without_uids_are_told_apart_by_their_numbers(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    two_series(
        scan,
        other_scan,
        tmp_path,
        tagged(SeriesInstanceUID="", SeriesNumber=7),
        tagged(SeriesInstanceUID="", SeriesNumber=8),
    )
    assert_same(ct.read_ct(tmp_path), scan)
    assert_same(ct.read_ct(tmp_path, 8), other_scan)


def test_two_patients_in_one_folder_are_refused(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    two_series(scan, other_scan, tmp_path, tagged(PatientID="A"), tagged(PatientID="B"))
    with pytest.raises(DataError, match="holds 2 patients"):
        ct.read_ct(tmp_path)


def test_rounding_of_the_geometry_does_not_split_a_series(scan: sitk.Image, tmp_path: Path) -> None:
    def jitter(dataset: pydicom.Dataset, index: int) -> None:
        dataset.ImageOrientationPatient = [1, 0.0004 + 0.0002 * (index % 2), 0, 0, 1, 0]
        dataset.PixelSpacing = [5.00004 + 0.00002 * (index % 2), 4]

    got = ct.read_ct(series(scan, tmp_path, jitter))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(scan))


# --- slices that are too many, too few, or askew ---------------------------------------------


def test_copies_of_slices_are_dropped(scan: sitk.Image, tmp_path: Path) -> None:
    def raise_a_little(dataset: pydicom.Dataset, index: int) -> None:
        dataset.ImagePositionPatient[2] += 0.05 * (index % 2)

    two_series(scan, scan, tmp_path, tagged(), raise_a_little)
    assert_same(ct.read_ct(tmp_path), scan)


def test_the_larger_of_two_acquisitions_is_taken_with_a_warning(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    def second(dataset: pydicom.Dataset, index: int) -> bool:
        dataset.AcquisitionNumber = 2
        return index % 2 == 0

    two_series(scan, other_scan, tmp_path, tagged(AcquisitionNumber=1), second)
    with pytest.warns(DataWarning, match="20 slices were dropped"):
        assert_same(ct.read_ct(tmp_path), scan)


def test_acquisitions_that_overlap_are_refused(
    scan: sitk.Image, other_scan: sitk.Image, tmp_path: Path
) -> None:
    def lower(dataset: pydicom.Dataset, index: int) -> bool:
        dataset.AcquisitionNumber = 1
        return index < 22

    def upper(dataset: pydicom.Dataset, index: int) -> bool:
        dataset.AcquisitionNumber = 2
        return index >= 20

    two_series(scan, other_scan, tmp_path, lower, upper)
    with pytest.raises(DataError, match="overlap"):
        ct.read_ct(tmp_path)


def test_a_missing_slice_is_interpolated_with_a_warning(scan: sitk.Image, tmp_path: Path) -> None:
    thin = with_step(scan, 3.0)
    series(thin, tmp_path, lambda _, index: index != 20)
    with pytest.warns(DataWarning, match=r"3\.00 to 6\.00 mm apart"):
        got = ct.read_ct(tmp_path)
    wanted = sitk.GetArrayFromImage(thin)
    wanted[20] = ((wanted[19].astype(float) + wanted[21]) / 2).round()
    assert_same(got[:, :, :20], thin[:, :, :20])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(got), wanted)


def test_a_wide_gap_is_refused(scan: sitk.Image, tmp_path: Path) -> None:
    series(scan, tmp_path, lambda _, index: index != 20)
    with pytest.raises(DataError, match=r"gap of 12\.0 mm"):
        ct.read_ct(tmp_path)


def tilted(scan: sitk.Image, folder: Path, degrees: float, axis: int) -> Path:
    """Slices of a tilted gantry: planes turned, the table moved along z as ever."""
    angle = np.radians(degrees)
    row, column = np.eye(3)[0], np.eye(3)[1]
    if axis == 0:
        row = np.array([np.cos(angle), 0, np.sin(angle)])
    else:
        column = np.array([0, np.cos(angle), np.sin(angle)])
    axes = np.stack([row, column, np.cross(row, column)])

    def edit(dataset: pydicom.Dataset, index: int) -> None:
        place = scan.TransformIndexToPhysicalPoint((0, 0, index))
        plane = sitk.Image([80, 64, 2], sitk.sitkInt16)
        plane.SetSpacing((4, 5, 1))
        plane.SetOrigin(place)
        plane.SetDirection(axes.T.ravel().tolist())
        cut = sitk.Resample(scan, plane, sitk.Transform(), sitk.sitkLinear, -1000)
        dataset.PixelData = sitk.GetArrayFromImage(cut)[0].tobytes()
        dataset.ImageOrientationPatient = dicom.decimals([*row, *column])
        dataset.ImagePositionPatient = dicom.decimals(place)

    return series(scan, folder, edit)


def with_landmark(scan: sitk.Image) -> tuple[sitk.Image, np.ndarray]:
    """The scan with a smooth ball of 2500 HU in it, and the ball's place in mm."""
    k, j, i = np.meshgrid(*(np.arange(n) for n in scan.GetSize()[::-1]), indexing="ij")
    centre = (37.3, 29.6, 22.4)
    far = ((i - centre[0]) * 4) ** 2 + ((j - centre[1]) * 5) ** 2 + ((k - centre[2]) * 6) ** 2
    ball = 3500 * np.exp(-far / 2 / 10**2) - 1024
    values = np.maximum(sitk.GetArrayFromImage(scan), ball).round().astype(np.int16)
    image = sitk.GetImageFromArray(values)
    image.CopyInformation(scan)
    return image, np.array(scan.TransformContinuousIndexToPhysicalPoint(centre))


def landmark(image: sitk.Image) -> np.ndarray:
    """Centre of mass of what is above 1200 HU."""
    weight = np.maximum(sitk.GetArrayFromImage(image).astype(float) - 1200, 0)
    index = [float((weight * grid).sum() / weight.sum()) for grid in np.indices(weight.shape)]
    return np.array(image.TransformContinuousIndexToPhysicalPoint(index[::-1]))


@pytest.mark.parametrize(
    ("degrees", "axis"), [(20, 1), (-20, 1), (30, 1), (15, 0), (-0.5, 1), (1.5, 0)]
)
def test_a_tilted_gantry_is_undone(
    scan: sitk.Image, tmp_path: Path, degrees: float, axis: int
) -> None:
    image, place = with_landmark(scan)
    assert np.linalg.norm(landmark(image) - place) < 0.3
    tilted(image, tmp_path, degrees, axis)
    with pytest.warns(DataWarning, match=f"tilted by {abs(degrees):.1f} degrees"):
        got = ct.read_ct(tmp_path)
    assert np.linalg.norm(landmark(got) - place) < 0.5
    axes = np.array(got.GetDirection()).reshape(3, 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)


def test_an_absurd_tilt_is_refused(scan: sitk.Image, tmp_path: Path) -> None:
    def slide(dataset: pydicom.Dataset, index: int) -> None:
        dataset.ImagePositionPatient = [0, index * 6.0, index * 6.0]

    with pytest.raises(DataError, match="45 degrees"):
        ct.read_ct(series(scan, tmp_path, slide))


# --- nothing is lost in silence --------------------------------------------------------------


def test_a_slice_lost_at_the_end_is_noticed(scan: sitk.Image, tmp_path: Path) -> None:
    """No gap would show it."""
    series(scan, tmp_path, lambda d, index: d.__delattr__("PixelSpacing") if index == 39 else None)
    with pytest.raises(DataError, match=r"039\.dcm has no proper PixelSpacing"):
        ct.read_ct(tmp_path)


def test_a_series_whose_headers_fall_apart_is_noticed(scan: sitk.Image, tmp_path: Path) -> None:
    def rename(dataset: pydicom.Dataset, index: int) -> None:
        dataset.SeriesDescription = "upper" if index > 24 else "lower"

    series(scan, tmp_path, rename)
    with pytest.raises(DataError, match="leaves out 90 mm"):
        ct.read_ct(tmp_path)
    assert_same(ct.read_ct(tmp_path, "lower"), scan[:, :, :25])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(scan: sitk.Image, tmp_path: Path) -> None:
    series(scan, tmp_path)
    (tmp_path / "020.dcm").chmod(0)
    with pytest.raises(DataError, match=r"020\.dcm cannot be opened"):
        ct.read_ct(tmp_path)


def test_an_unreadable_folder_or_file_is_named(
    scan: sitk.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, where the tests run as root."""
    series(scan, tmp_path)
    honest = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "039.dcm":
            raise PermissionError(13, "Permission denied", str(self))
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"039\.dcm cannot be opened"):
        ct.read_ct(tmp_path)
