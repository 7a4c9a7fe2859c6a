import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk

from covidmtl_core import evaluation, preprocessing, quality, store
from covidmtl_core.dicom import write_series
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.phantom import draw_patient, make_phantom
from covidmtl_core.preprocessing import preprocess, preprocess_scan
from covidmtl_core.radiomics.features import extract_features
from covidmtl_core.radiomics.names import FEATURE_NAMES

SIZE, SPACING = (57, 65, 65), 6.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five phantoms as DICOM, one damaged scan, one that is missing."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = ["patient_id,path,ct,nat,severity,split"]
    for seed in range(5):
        scan = make_phantom(draw_patient(seed, 0.1 * (seed > 1)), SIZE, SPACING)
        write_series(scan.image, folder / f"scan {seed}")
        lines.append(f"p{seed},scan {seed},{int(seed > 1)},,,{'train' if seed else 'test'}")
    (folder / "damaged.nii.gz").write_bytes(b"\x1f\x8b no volume")
    lines += ["damaged,damaged.nii.gz,1,1,1,train", "missing,nowhere,0,0,0,test"]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ready") / "made" / "here"
    preprocess(source, target, SPACING)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_scan_becomes_a_cropped_volume_lungs_and_features(source: Path, done: Path) -> None:
    truth = make_phantom(draw_patient(3, 0.1), SIZE, SPACING)
    folder = done / "scans" / "p3"
    volume, lungs = (store.read(folder / f"{name}.b2nd") for name in ("volume", "lungs"))
    assert volume.GetSize() == lungs.GetSize() and np.prod(volume.GetSize()) < np.prod(SIZE) / 2
    whole = sitk.Resample(lungs, truth.lungs, sitk.Transform(), sitk.sitkNearestNeighbor)
    found, expected = (sitk.GetArrayFromImage(m) > 0 for m in (whole, truth.lungs))
    assert evaluation.overlap_metrics(found, expected)["dice"] > 0.93
    hu = sitk.GetArrayFromImage(
        sitk.Resample(volume, truth.image, sitk.Transform(), sitk.sitkNearestNeighbor)
    )
    assert np.array_equal(hu[found], sitk.GetArrayFromImage(truth.image)[found])
    record = json.loads((folder / "scan.json").read_text())
    volume_ml = found.sum() * SPACING**3 / 1000
    assert record["right_ml"] + record["left_ml"] == pytest.approx(volume_ml, rel=1e-3)
    features = pd.read_csv(done / "features.csv", index_col="patient_id")
    assert tuple(features.columns) == FEATURE_NAMES and len(features) == 5
    again = extract_features(volume, lungs)
    np.testing.assert_allclose(features.loc["p3"], again, rtol=1e-12)


def test_failures_are_recorded_and_the_rest_is_done(done: Path) -> None:
    scans = pd.read_csv(done / "scans.csv", index_col="patient_id")
    assert scans["state"].value_counts().to_dict() == {"ready": 5, "failed": 2}
    assert "damaged.nii.gz" in scans.loc["damaged", "reason"]
    assert "does not exist" in scans.loc["missing", "reason"]
    assert scans.loc["p0", "split"] == "test" and np.isnan(scans.loc["p0", "nat"])
    page = (done / "quality.html").read_text()
    assert "5 scans ready, 2 failed" in page and "scans/p4/quality.png" in page
    assert sorted(p.name for p in done.iterdir()) == sorted(
        [".lock", "features.csv", "quality.html", "scans", "scans.csv", "settings.json"]
    )


def test_a_repaired_scan_is_made_by_the_next_run_and_the_rest_left(
    source: Path, done: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    shutil.copytree(done, tmp_path / "target")
    image = make_phantom(draw_patient(9), SIZE, SPACING).image
    sitk.WriteImage(image, tmp_path / "source" / "damaged.nii.gz")
    before = (tmp_path / "target" / "scans" / "p1").stat().st_mtime_ns
    scans = preprocess(tmp_path / "source", tmp_path / "target", SPACING)
    assert scans.loc["damaged", "state"] == "ready"
    assert (tmp_path / "target" / "scans" / "p1").stat().st_mtime_ns == before
    assert len(pd.read_csv(tmp_path / "target" / "features.csv")) == 6


def test_killed_at_random_points_it_ends_with_the_same_folder(
    source: Path, done: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    program = "from covidmtl_core.cli import main; main()"
    command = [sys.executable, "-c", program, "preprocess", str(source), str(target)]
    command += ["--spacing", str(SPACING), "--jobs", "1"]
    draw = random.Random(7)
    for done_before in (0, 0, 0, 0, 1, 1, 1, 2, 2, 2):
        run = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and _ready(target) < done_before:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1 if done_before else 3))
        os.killpg(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert 2 <= _ready(target) < 5
    preprocess(source, target, SPACING)
    assert contents(target) == contents(done)


def _ready(target: Path) -> int:
    return len(list((target / "scans").glob("*")))


def test_parts_at_once_make_the_folder_of_one_run(source: Path, done: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = [sys.executable, "-m", "covidmtl_core.cli", "preprocess", str(source), str(target)]
    command += ["--spacing", str(SPACING), "--jobs", "1", "--part"]

    def start(part: str) -> subprocess.Popen:  # type: ignore[type-arg]
        return subprocess.Popen([*command, part], start_new_session=True, stdout=subprocess.PIPE)

    runs = [start(part) for part in ("1/3", "2/3", "3/3")]
    deadline = time.monotonic() + 60
    while not all((target / ".partial" / f"{k}-of-3").is_dir() for k in (1, 2, 3)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(runs[0].pid, signal.SIGKILL)
    for run in runs[1:]:
        os.killpg(run.pid, signal.SIGSTOP)
    for another in (None, (2, 2)):
        with pytest.raises(DataError, match="Another run"):
            preprocess(source, target, SPACING, part=another)
    runs.append(start("3/3"))  # waits for the first of that name
    for run in runs[1:]:
        os.killpg(run.pid, signal.SIGCONT)
    said = [run.communicate(timeout=120)[0].decode() for run in runs]
    assert "Part 2/3: 2 scans ready, 0 failed." in said[1]
    assert "Part 3/3: 1 scans ready, 1 failed." in said[2]
    assert said[3] == said[2]
    assert not (target / "scans.csv").exists() and _ready(target) < 5
    assert start("1/3").wait(120) == 0 and _ready(target) == 5
    before = (target / "scans" / "p0" / "scan.json").stat().st_mtime_ns
    preprocess(source, target, SPACING)
    assert (target / "scans" / "p0" / "scan.json").stat().st_mtime_ns == before
    assert contents(target) == contents(done)
    assert len(preprocess(source, target, SPACING, part=(9, 9))) == 0


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3"])
def test_an_impossible_part_is_refused(part: str, source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "covidmtl_core.cli", "preprocess", source, tmp_path / "t"]
    answer = subprocess.run([*words, f"--part={part}"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert f"part is {part}; it must be" in answer.stderr.replace("'", "")
    assert not (tmp_path / "t").exists()


def test_a_scan_that_cannot_be_drawn_fails_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(quality, "draw", refuse)
    made = preprocessing._try_scan(tmp_path, "p1", str(source / "scan 1"), {}, SPACING, "refined")
    assert made == ("p1", "unexpected ZeroDivisionError: no picture")


def test_changed_or_damaged_scans_are_made_again(source: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    shutil.copytree(done, tmp_path / "target")
    before = contents(tmp_path / "target")
    scans = tmp_path / "target" / "scans"
    (scans / "p1" / "volume.b2nd").write_bytes(b"")
    (scans / "p2" / "scan.json").write_text("[]")
    (scans / "p3" / "lungs.b2nd").unlink()
    preprocess(tmp_path / "source", tmp_path / "target", SPACING)
    assert contents(tmp_path / "target") == before
    shutil.rmtree(tmp_path / "source" / "scan 4")
    shutil.copytree(tmp_path / "source" / "scan 3", tmp_path / "source" / "scan 4")
    (tmp_path / "source" / "scan 4").joinpath("new").touch()
    shutil.rmtree(tmp_path / "source" / "scan 2")
    table = preprocess(tmp_path / "source", tmp_path / "target", SPACING)
    assert table.loc["p4", "lungs_ml"] == table.loc["p3", "lungs_ml"]
    assert table.loc["p2", "state"] == "failed" and not (scans / "p2").exists()


def test_nothing_of_the_readers_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text("mine")
    with pytest.raises(ParameterError, match="holds other things"):
        preprocess(source, tmp_path, SPACING)
    for target in (source, source.parent):
        with pytest.raises(ParameterError, match="lies in"):
            preprocess(source, target, SPACING)
    assert (tmp_path / "features.csv").read_text() == "mine"


def test_a_full_disk_is_one_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write", fail)
    monkeypatch.setattr(
        preprocessing, "Parallel", lambda **_: lambda calls: (f(*a, **k) for f, a, k in calls)
    )
    with pytest.raises(DataError, match=r"cannot be written \(No space"):
        preprocess(source, tmp_path / "target", SPACING)


def test_two_runs_at_once_are_refused(source: Path, done: Path) -> None:
    from filelock import FileLock

    with FileLock(done / ".lock"), pytest.raises(DataError, match="Another run"):
        preprocess(source, done, SPACING)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"spacing_mm": 4.0}, r"made with spacing_mm 6\.0"),
        ({"method": "classical"}, "made with method 'refined'"),
        ({"method": "best"}, "'best'"),
        ({"spacing_mm": 0}, "0 mm"),
        ({"spacing_mm": float("nan")}, "nan mm"),
    ],
)
def test_other_settings_are_refused(source: Path, done: Path, options: dict, named: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ParameterError, match=named):
        preprocess(source, done, **{"spacing_mm": SPACING, **options})


def test_a_source_without_labels_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match=r"labels\.csv"):
        preprocess(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_remarks_name_what_is_odd(source: Path, tmp_path: Path) -> None:
    made = preprocess_scan(source / "scan 2", SPACING)
    assert made.measures["remarks"] == "The slices are 6 mm apart."
    image = make_phantom(draw_patient(2, 0.1), SIZE, SPACING).image
    sitk.WriteImage(image[:, :, 20:], tmp_path / "cut.nii.gz")
    cut = preprocess_scan(tmp_path / "cut.nii.gz", SPACING)
    assert "The lungs reach the lowest slice." in cut.measures["remarks"]


PLANTED = "Mustermann"
IDENTIFYING = (
    "PatientName",
    "PatientID",
    "OtherPatientIDs",
    "PatientComments",
    "PatientAddress",
    "ReferringPhysicianName",
    "InstitutionName",
    "AccessionNumber",
    "StudyDescription",
    "ImageComments",
)


def test_who_the_patient_is_leaves_the_scan_nowhere(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    scan = make_phantom(draw_patient(3, 0.2), SIZE, SPACING).image
    for name in ("whole", "broken"):
        write_series(scan, source / name)
        for path in (source / name).iterdir():
            dataset = pydicom.dcmread(path)
            for keyword in IDENTIFYING:
                setattr(dataset, keyword, PLANTED)
            dataset.save_as(path)
    lost = sorted((source / "broken").iterdir(), key=lambda p: pydicom.dcmread(p).InstanceNumber)
    lost[20].unlink()
    scan.SetMetaData("descrip", PLANTED)
    sitk.WriteImage(scan, source / "n.nii.gz")
    lines = ["patient_id,path,ct,nat,severity"]
    lines += [f"p{k},{name},1,1,1" for k, name in enumerate(("whole", "broken", "n.nii.gz"))]
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    said = []
    for command in (["check", source], ["preprocess", source, target, "--spacing", str(SPACING)]):
        words = [sys.executable, "-m", "covidmtl_core.cli", *map(str, command)]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=120)
        said.append(answer.stdout + answer.stderr)
    assert "2 scans ready" in said[1] and "p1" in said[1], said
    assert not any(PLANTED in text for text in said)
    assert not any(PLANTED.encode() in content for content in contents(target).values())
    image = store.read(target / "scans" / "p0" / "volume.b2nd")
    assert not image.GetMetaDataKeys()
