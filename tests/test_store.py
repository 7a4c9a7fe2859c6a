"""Volumes that can be read in parts, and the patients made of them."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from covidmtl_core import store
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.store import Patients, read_crop


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder with a volume larger than a chunk and its lungs; HU, -1024 outside the lungs."""
    folder = tmp_path_factory.mktemp("scan")
    rng = np.random.default_rng(0)
    values = rng.integers(-1500, 3000, (70, 150, 140), dtype=np.int16)
    lungs = rng.integers(0, 3, values.shape, dtype=np.uint8)
    for name, array in (("volume", values), ("lungs", lungs)):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((0.7, 0.8, 1.25))
        image.SetOrigin((1.5, -2.0, 3.0))
        image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
        store.write(image, folder / f"{name}.b2nd")
    return folder, np.where(lungs > 0, values, -1024).astype(np.int16)


def test_a_volume_comes_back_whole(scan: tuple[Path, np.ndarray]) -> None:
    folder, masked = scan
    volume, lungs = (store.read(folder / f"{name}.b2nd") for name in ("volume", "lungs"))
    assert volume.GetSpacing() == (0.7, 0.8, 1.25) and volume.GetOrigin() == (1.5, -2.0, 3.0)
    assert volume.GetDirection() == (0, 1, 0, 1, 0, 0, 0, 0, -1)
    values = sitk.GetArrayFromImage(volume)
    assert values.dtype == np.int16 and values.min() < -1024
    assert np.array_equal(np.where(sitk.GetArrayFromImage(lungs) > 0, values, -1024), masked)


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((5, 20, 30), (40, 64, 100)),
        ((-10, -3, 100), (90, 200, 90)),
        ((0, 0, 0), (70, 150, 140)),
        ((90, 0, 0), (5, 5, 5)),
        ((-20, 0, 0), (20, 5, 5)),
    ],
)
def test_a_crop_is_what_it_would_be_of_the_whole(
    scan: tuple[Path, np.ndarray], start: tuple[int, ...], size: tuple[int, ...]
) -> None:
    folder, masked = scan
    padded = np.pad(np.clip(masked.astype(int) + 1024, 0, 2000), 200)
    wanted = padded[tuple(slice(s + 200, s + 200 + n) for s, n in zip(start, size, strict=True))]
    for volume in (folder, masked):
        crop = read_crop(volume, start, size)
        assert crop.dtype == np.int16 and np.array_equal(crop, wanted)


def test_a_damaged_file_is_named(scan: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    whole = (scan[0] / "volume.b2nd").read_bytes()
    path = tmp_path / "volume.b2nd"
    lungs = (scan[0] / "lungs.b2nd").read_bytes()
    (tmp_path / "lungs.b2nd").write_bytes(lungs)
    with pytest.raises(DataError, match=r"volume\.b2nd is missing"):
        store.read(path)
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"volume\.b2nd is damaged"):
            read_crop(tmp_path, (0, 0, 0), (70, 150, 140))
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match=r"volume\.b2nd is damaged"):
        read_crop(tmp_path, (0, 0, 0), (2, 2, 2))
    path.write_bytes(whole)
    store.write(sitk.GetImageFromArray(np.ones((3, 3, 3), np.uint8)), tmp_path / "lungs.b2nd")
    with pytest.raises(DataError, match=r"lungs\.b2nd has another size"):
        read_crop(tmp_path, (0, 0, 0), (2, 2, 2))


def test_a_flipped_bit_is_found(scan: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    whole = bytearray((scan[0] / "volume.b2nd").read_bytes())
    path, box = tmp_path / "volume.b2nd", ((0, 0, 0), (70, 150, 140))
    shutil.copy(scan[0] / "lungs.b2nd", tmp_path)
    path.write_bytes(whole)
    reads = (lambda: read_crop(tmp_path, *box), lambda: sitk.GetArrayFromImage(store.read(path)))
    right = [read() for read in reads]
    rng, found = np.random.default_rng(0), 0
    anywhere = rng.integers(8 * len(whole), size=100)
    header = rng.integers(8 * 300, size=100)
    data_type = 8 * whole.index(b"<i2") + np.arange(24)
    for place in [*anywhere, *header, *data_type]:
        changed = whole.copy()
        changed[place // 8] ^= 1 << int(place % 8)
        path.write_bytes(changed)
        for read, wanted in zip(reads, right, strict=True):
            try:
                assert np.array_equal(read(), wanted), "never other voxels"
            except DataError as error:
                assert "damaged" in str(error)
                found += 1
    assert found > 250


LABELS = pd.DataFrame({"ct": [0, 1, 1], "severity": [2, pd.NA, 0]}, index=["a", "b", "c"])


def test_patients_give_batches(scan: tuple[Path, np.ndarray]) -> None:
    features = pd.DataFrame({"x": [1.0, 2, 3], "y": [4.0, 5, 6]}, index=["c", "b", "a"])
    patients = Patients(LABELS, features, dict.fromkeys("abc", scan[0]))
    patients = patients.cropped((20, 30, 40), (3, 4, 0))
    batch = patients.__getitems__([(2, None), (1, 7), (1, 7), (1, 8)])
    assert batch["features"].tolist() == [[1, 4], [2, 5], [2, 5], [2, 5]]
    assert batch["labels"]["severity"].tolist() == [0, -1, -1, -1]
    centre = read_crop(scan[1], (25, 60, 50), (20, 30, 40))
    assert torch.equal(batch["volume"][0, 0], torch.from_numpy(centre))
    assert torch.equal(batch["volume"][1], batch["volume"][2])
    assert not torch.equal(batch["volume"][1], batch["volume"][3])
    mean, sd = patients.standardisation()
    assert mean == pytest.approx(centre.mean()) and sd == pytest.approx(centre.std())


def test_fingerprint_notices_every_change(scan: tuple[Path, np.ndarray]) -> None:
    features = pd.DataFrame({"x": [1.0, 2, 3]}, index=list("abc"))
    volumes = dict.fromkeys("abc", scan[1][:9, :9, :9])
    same = Patients(LABELS, features, volumes).fingerprint()
    assert Patients(LABELS.copy(), features.copy(), dict(volumes)).fingerprint() == same
    others = [
        Patients(LABELS.assign(ct=[0, 1, 0]), features, volumes),
        Patients(LABELS, features + 1e-9, volumes),
        Patients(LABELS, features, volumes | {"a": volumes["a"] + 1}),
        Patients(LABELS.iloc[::-1], features, volumes),
        Patients(LABELS, features, dict.fromkeys("abc", scan[0])),
    ]
    assert len({same, *(other.fingerprint() for other in others)}) == 6


def test_patients_that_cannot_be_used() -> None:
    features = pd.DataFrame({"x": [1.0, np.nan, 3]}, index=list("abc"))
    with pytest.raises(DataError, match="feature x of patient b is not a number"):
        Patients(LABELS, features)
    with pytest.raises(DataError, match="1 patients have no features, the first is c"):
        Patients(LABELS, features.iloc[:1].reindex(["a", "b"], fill_value=0.0))
    whole = features.fillna(0)
    with pytest.raises(DataError, match="patient b is in the features more than once"):
        Patients(LABELS, whole.iloc[[0, 1, 1, 2]])
    with pytest.raises(DataError, match=r"ct of patient b is 0\.5"):
        Patients(LABELS.assign(ct=[0, 0.5, 1]), whole)
    with pytest.raises(DataError, match="ct of patient c is yes"):
        Patients(LABELS.assign(ct=[0, 1, "yes"]), whole)
    with pytest.raises(ParameterError, match="volumes, features or both"):
        Patients(LABELS)


def test_a_folder_that_does_not_say_how_it_was_made_is_named(tmp_path: Path) -> None:
    for content in (None, "{", "[1]"):
        if content:
            (tmp_path / "settings.json").write_text(content)
        with pytest.raises(DataError, match=r"settings\.json is missing or damaged"):
            store.load_settings(tmp_path)
    (tmp_path / "settings.json").write_text('{"spacing_mm": 1.0}')
    assert store.load_settings(tmp_path) == {"spacing_mm": 1.0}
