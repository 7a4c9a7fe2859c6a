import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from covidmtl_core import _released_segmentation as released
from covidmtl_core import ct, evaluation
from covidmtl_core.benchmarks import plain_segmentation as plain
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.phantom import Phantom, draw_patient, make_phantom
from covidmtl_core.segmentation import LEFT, RIGHT, _zoomed, segment_lungs

SIZE, SPACING = (136, 156, 156), 2.5


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def scan(seed: int, burden: float = 0.05, **changes: object) -> Phantom:
    return make_phantom(draw_patient(seed, burden, **changes), SIZE, SPACING)


def by_side(mask: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    return {
        side: evaluation.overlap_metrics(mask == side, truth == side)["dice"]
        for side in (RIGHT, LEFT)
    }


@pytest.fixture(scope="module")
def sick() -> Phantom:
    return scan(21, burden=0.15, padding=-2000, field_of_view=380.0)


def test_refined_finds_both_lungs_lesions_and_nothing_far_away(sick: Phantom) -> None:
    mask, truth, lesions = (array(i) for i in (segment_lungs(sick.image), sick.lungs, sick.lesions))
    assert min(by_side(mask, truth).values()) > 0.96
    assert (mask[lesions > 0] > 0).mean() > 0.8
    far = ndimage.distance_transform_edt(truth == 0, sampling=SPACING) > 20
    assert not mask[far].any(), "trachea, bowel gas, table or air outside"


def test_trachea_and_main_bronchi_are_left_out(sick: Phantom) -> None:
    hu, truth = array(sick.image), array(sick.lungs)
    gas = (hu < -900) & (truth == 0)
    mask = array(segment_lungs(sick.image)) > 0
    airways = gas[96:120, 48:104, 64:92]
    assert airways.sum() > 100
    assert (mask[96:120, 48:104, 64:92] & airways).sum() < 0.02 * airways.sum()


@pytest.mark.parametrize("code", ["RAS", "LPI", "SAR"])
def test_orientation_of_the_voxels_does_not_matter(sick: Phantom, code: str) -> None:
    turned = segment_lungs(sitk.DICOMOrient(sick.image, code))
    assert np.array_equal(array(sitk.DICOMOrient(turned, "LPS")), array(segment_lungs(sick.image)))


def test_lungs_that_no_airway_joins_are_both_kept() -> None:
    blocked = scan(22, blocked=True)
    truth = array(blocked.lungs)
    assert min(by_side(array(segment_lungs(blocked.image)), truth).values()) > 0.97
    classical = released.classical(np.clip(array(blocked.image) + 1024, 0, 4095).astype(np.int16))
    shares = [classical[truth == side].mean() for side in (RIGHT, LEFT)]
    assert min(shares) < 0.01 and max(shares) > 0.9, "the classical method loses one"


def test_lung_white_for_a_third_is_still_a_lung_on_its_side() -> None:
    white = scan(23, white=0.33)
    truth, mask = array(white.lungs), array(segment_lungs(white.image))
    for side in (RIGHT, LEFT):
        assert evaluation.overlap_metrics(mask == side, truth == side)["precision"] > 0.95
        assert evaluation.overlap_metrics(mask == side, truth == side)["recall"] > 0.6


def test_half_infected_lungs_keep_most_of_their_lesions() -> None:
    severe = scan(24, burden=0.4)
    mask, truth, lesions = (
        array(i) for i in (segment_lungs(severe.image), severe.lungs, severe.lesions)
    )
    assert evaluation.overlap_metrics(mask, truth)["dice"] > 0.94
    assert (mask[lesions > 0] > 0).mean() > 0.75


@pytest.mark.parametrize("spacing", [(5.0, 1.4, 1.4), (1.25, 3.0, 3.0), (8.0, 4.0, 4.0)])
def test_any_spacing(spacing: tuple[float, float, float]) -> None:
    size = [round(n * SPACING / s) for n, s in zip(SIZE, spacing, strict=True)]
    made = make_phantom(draw_patient(25, 0.05), size, spacing)
    sides = by_side(array(segment_lungs(made.image)), array(made.lungs))
    assert min(sides.values()) > 0.95


@pytest.fixture(scope="module")
def small() -> Phantom:
    return make_phantom(draw_patient(3, 0.05), (114, 130, 130), 3.0)


@pytest.mark.parametrize("face", ["back", "front", "left", "right", "head", "feet"])
def test_a_scan_that_cuts_the_lungs(small: Phantom, face: str) -> None:
    axis = {"back": 1, "front": 1, "left": 2, "right": 2, "head": 0, "feet": 0}[face]
    places = np.nonzero(array(small.lungs))[axis]
    cut = slice(None, int(places.max()) - 2)
    if face in ("front", "right", "feet"):
        cut = slice(int(places.min()) + 3, None)
    box = tuple(cut if axis == 2 - k else slice(None) for k in range(3))
    sides = by_side(array(segment_lungs(small.image[box])), array(small.lungs[box]))
    assert min(sides.values()) > 0.97


@pytest.mark.parametrize("kind", [sitk.sitkFloat32, sitk.sitkInt32, sitk.sitkFloat64])
def test_pixel_type_does_not_matter(small: Phantom, kind: int) -> None:
    metal = sitk.Cast(small.image, sitk.sitkInt32)
    metal[0, 0, 0] = 60_000
    mask = segment_lungs(sitk.Cast(metal, kind))
    assert np.array_equal(array(mask), array(segment_lungs(small.image)))


def test_sizes_that_are_no_whole_blocks_are_labelled_to_the_last_voxel() -> None:
    made = make_phantom(draw_patient(3, 0.05), (171, 195, 197), 1.9, device="cpu")
    fine = sitk.Expand(made.lungs, (2, 2, 2), sitk.sitkNearestNeighbor)[1:, 1:, 1:]
    image = sitk.Expand(made.image, (2, 2, 2), sitk.sitkNearestNeighbor)[1:, 1:, 1:]
    mask = array(segment_lungs(image, lambda _: fine > 0))
    assert np.array_equal(mask > 0, array(fine) > 0)


def test_one_small_lung_is_enough() -> None:
    distance = np.linalg.norm(
        np.indices((60, 60, 60)) - np.array([[[[30]]], [[[30]]], [[[20]]]]), axis=0
    )
    image = sitk.GetImageFromArray(np.where(distance < 12, -850, 40).astype(np.int16))
    image.SetSpacing((3.0, 3.0, 3.0))
    mask = array(segment_lungs(image))
    assert (mask[distance < 11] == RIGHT).all() and not mask[distance > 14].any()


def test_emptier_lungs_and_more_noise() -> None:
    made = scan(26, burden=0.0, parenchyma=-930.0, noise=90.0)
    assert min(by_side(array(segment_lungs(made.image)), array(made.lungs)).values()) > 0.97


@pytest.mark.parametrize("burden", [0.0, 0.3])
def test_released_is_the_plain_algorithm_voxel_by_voxel(burden: float) -> None:
    slab = make_phantom(draw_patient(31, burden, stretch=(1, 1.15, 1.15)), (16, 390, 390), 1.0)
    volume = np.clip(array(slab.image) + 1024, 0, 4095).astype(np.int16)
    start = released.classical(volume)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = plain.classical(volume)
        assert np.array_equal(start, expected)
        expected = plain.refine(volume, expected)
    assert start.sum(axis=(1, 2)).max() > 15_000, "the snakes have run"
    assert np.array_equal(released.refine(volume, start, n_jobs=1), expected)
    assert np.array_equal(array(segment_lungs(slab.image, "released")) > 0, expected)
    assert not np.array_equal(expected, start)


def test_regions_of_a_slice_are_right_for_odd_and_even_sizes() -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        noise = ndimage.gaussian_filter(rng.normal(size=rng.integers(3, 50, 2)), 1)
        labels, (expected, count) = (
            released._regions(noise > 0),
            ndimage.label(noise > 0, np.ones((3, 3))),
        )
        pairs = {*zip(labels.ravel().tolist(), expected.ravel().tolist(), strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == count + bool((noise <= 0).any())


def test_methods_at_other_spacings_go_through_one_mm() -> None:
    coarse = make_phantom(draw_patient(32, 0.1), (24, 195, 195), 2.0)
    mask = segment_lungs(coarse.image, "released")
    assert mask.GetSize() == coarse.image.GetSize() and mask.GetSpacing() == (2.0, 2.0, 2.0)
    assert evaluation.overlap_metrics(array(mask), array(coarse.lungs))["dice"] > 0.85


def test_another_segmenter_can_be_passed(sick: Phantom) -> None:
    both = segment_lungs(sick.image, lambda image: sick.lungs > 0)
    assert min(by_side(array(both), array(sick.lungs)).values()) > 0.995
    same = segment_lungs(sick.image, lambda image: sick.lungs)
    assert np.array_equal(array(same), array(sick.lungs))


def test_a_segmenter_with_another_grid_or_unknown_labels_is_refused(sick: Phantom) -> None:
    with pytest.raises(ParameterError, match="grid"):
        segment_lungs(sick.image, lambda image: sick.lungs[1:])
    with pytest.raises(ParameterError, match=r"\[1, 2, 5\]"):
        segment_lungs(sick.image, lambda image: sitk.Maximum(sick.lungs, 5 * (sick.lesions == 1)))


def test_what_cannot_be_done_is_said() -> None:
    water = sitk.Image([64, 64, 40], sitk.sitkInt16)
    for method in ("refined", "classical", "released"):
        with pytest.raises(DataError, match="found no lung"):
            segment_lungs(water, method)
    with pytest.raises(ParameterError, match=r"'unet'.*classical, released, refined"):
        segment_lungs(water, "unet")


def test_a_clinical_scan_with_a_published_mask(ct_folder: Path) -> None:
    image = ct.read_ct(ct_folder / "cip-ct-64" / "ct-64.nrrd")
    truth = array(sitk.ReadImage(str(ct_folder / "cip-ct-64" / "wholeLung-64.nrrd"))) > 0
    regions = array(sitk.ReadImage(str(ct_folder / "cip-ct-64" / "lm-64.nrrd")))
    truth &= regions >> 8 != 2
    mask = array(segment_lungs(image))
    dice = evaluation.overlap_metrics(mask, truth)["dice"]
    assert dice >= 0.975
    classical = array(segment_lungs(image, "classical"))
    assert dice >= evaluation.overlap_metrics(classical, truth)["dice"]
    for side, thirds in ((LEFT, (9, 10, 11)), (RIGHT, (12, 13, 14))):
        own = np.isin(regions & 255, thirds) & truth
        assert (mask[own] == side).mean() > 0.98


@pytest.mark.parametrize("name", ["covid-ct-md-P002-dicom", "covid-ct-md-normal001.nii.gz"])
def test_real_series_have_two_whole_lungs_on_their_sides(ct_folder: Path, name: str) -> None:
    image = ct.read_ct(ct_folder / name)
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(segment_lungs(image))
    assert all(1_200 < shape.GetPhysicalSize(side) / 1000 < 3_500 for side in (RIGHT, LEFT))
    right, left = (shape.GetCentroid(side) for side in (RIGHT, LEFT))
    assert left[0] - right[0] > 80, "LPS: x runs to the patient's left"
    air = array(image) < -800
    middle = array(image).shape[0] // 2
    inside = array(segment_lungs(image))[middle] > 0
    enclosed = ndimage.binary_fill_holes(array(image)[middle] > -300) & air[middle]
    assert (inside & enclosed).sum() > 0.93 * enclosed.sum()


@pytest.mark.parametrize("shape", [(40, 30, 50), (9, 41, 25), (20, 20, 20)])
def test_a_scan_reaches_1_mm_by_the_splines_of_scipy(shape: tuple[int, int, int]) -> None:
    volume = np.random.default_rng(0).integers(0, 4095, (20, 20, 25)).astype(np.int16)
    scale = np.divide(shape, volume.shape)
    expected = ndimage.zoom(volume, scale, order=3, mode="nearest")
    assert np.array_equal(_zoomed(volume, shape), expected)
