"""Training: it learns, goes on where it was killed, shares its work, and says what is wrong."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from covidmtl_core import runs, store, training
from covidmtl_core.boxes import bounds
from covidmtl_core.errors import DataError, ParameterError, TrainingError
from covidmtl_core.phantom import draw_patient, make_phantom
from covidmtl_core.recipe import TrainConfig
from covidmtl_core.store import Patients
from covidmtl_core.training import fit, load, predict

SMALL = TrainConfig(
    tasks={"ct": 2, "severity": 3},
    use_features=True,
    crop=(16, 20, 20),
    jitter=(2, 2, 2),
    epochs=3,
    batch_size=4,
    shift_p=1.0,
    learning_rate=0.02,
)


def cohort(n: int = 10, seed: int = 0) -> Patients:
    """Noise, brighter in the positive."""
    rng = np.random.default_rng(seed)
    ids = [f"p{k}" for k in range(n)]
    labels = pd.DataFrame({"ct": np.arange(n) % 2, "severity": np.arange(n) % 3}, index=ids)
    volumes = {
        p: rng.normal(-800 + 200 * ct, 90, (24, 28, 26)).astype(np.int16)
        for p, ct in labels["ct"].items()
    }
    features = pd.DataFrame(rng.normal(size=(n, 5)), index=ids) + labels[["ct"]].to_numpy()
    return Patients(labels, features, volumes)


def numbers(history: pd.DataFrame) -> list[list[float]]:
    """All of a history that does not depend on the machine's speed."""
    return history.drop(columns=["samples_per_second", "seconds", "gib"]).to_numpy().tolist()


def test_trains_predicts_and_is_loaded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = fit(replace(SMALL, epochs=12, refresh_norms=True), cohort(16), tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 12 and "samples/s" in printed[-1] and "GiB" in printed[-1]
    assert trained.history["loss"].iloc[-1] < 0.7 * trained.history["loss"].iloc[0]
    table = pd.read_csv(trained.folder / "history.csv")
    assert np.allclose(table["loss"], trained.history["loss"])
    weights = table[["weight_ct", "weight_severity"]]
    assert np.allclose(weights.sum(axis=1), 1) and weights["weight_ct"].std() > 0.01
    others = cohort(9, seed=1)
    found = predict(trained, others)
    assert list(found.columns) == ["ct_0", "ct_1", "severity_0", "severity_1", "severity_2"]
    assert np.allclose(found[["ct_0", "ct_1"]].sum(axis=1), 1)
    assert roc_auc_score(others.labels["ct"], found["ct_1"]) >= 0.7
    again = load(trained.folder / "last.pt", "cpu")
    assert predict(again, others).equals(found) and again.config == trained.config
    assert np.allclose(predict(again, others, batch_size=2), found, atol=1e-5)
    slow = again.model.eval()
    volume, features = others.cropped(SMALL.crop)[0]["volume"], others.features[:1]
    mean, sd = again.scaling["volume"]
    scaled = (features - again.scaling["feature_least"]) / again.scaling["feature_range"]
    with torch.no_grad():
        outputs = slow(((volume - mean) / sd).float(), scaled.float())
    assert np.allclose(outputs["ct"].softmax(1), found.iloc[:1, :2], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "shiftnet3d"},
        {"model": "resnet3d34", "crop": (70, 36, 36), "learning_rate": 1e-3},
        {"model": "decovnet", "augmentation": None, "batch_size": 2, "epochs": 1},
        {
            "model": "squeezenet3d",
            "checkpointing": True,
            "micro_batches": 3,
            "standardise": "paper",
        },
    ],
)
def test_every_network_trains(tmp_path: Path, changes: dict) -> None:
    config = replace(
        SMALL,
        tasks={"ct": 2},
        use_features=False,
        **({"epochs": 2, "crop": (36, 40, 40)} | changes),
    )
    trained = fit(config, cohort(5), tmp_path, progress=False)
    assert np.isfinite(trained.history["loss"]).all()
    assert predict(trained, cohort(3)).shape == (3, 2)


@pytest.mark.parametrize("loss", ["random", "uncertainty", "uncertainty-as-released", "mean"])
def test_features_alone_with_missing_labels(tmp_path: Path, loss: str) -> None:
    patients = cohort(12)
    patients.labels["severity"][:8] = -1
    config = replace(SMALL, use_volume=False, loss=loss, shuffle=False, epochs=30)
    trained = fit(config, patients, tmp_path, progress=False)
    assert trained.history["loss_ct"].iloc[-1] < trained.history["loss_ct"].iloc[0]
    if loss == "uncertainty":
        saved = torch.load(trained.folder / "last.pt", weights_only=True)
        assert all(float(s.abs()) > 0.01 for s in saved["loss"].values())
    if loss == "uncertainty-as-released":
        mean = fit(replace(config, loss="mean"), patients, tmp_path, progress=False)
        assert np.allclose(trained.history["loss_ct"], mean.history["loss_ct"], rtol=1e-5)


def test_stopped_after_any_epoch_it_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole = fit(SMALL, cohort(), tmp_path / "whole", progress=False)
    keep, stop_at = training._Run._keep, []

    def interrupted(run: training._Run, row: dict) -> None:
        keep(run, row)
        if run.epoch in stop_at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "_keep", interrupted)
        for epoch in (1, 2):
            stop_at[:] = [epoch]
            with pytest.raises(KeyboardInterrupt):
                fit(SMALL, cohort(), tmp_path / "parts", progress=False)
    parts = fit(SMALL, cohort(), tmp_path / "parts", progress=False)
    assert numbers(parts.history) == numbers(whole.history)
    again, before = (run.model.state_dict() for run in (parts, whole))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_losses_of_seldom_labels_do_not_depend_on_the_parts(tmp_path: Path) -> None:
    patients = cohort(10)
    patients.labels["severity"][::2] = -1
    rates = {"learning_rate": 1e-6, "min_learning_rate": 0.0}
    config = replace(SMALL, use_volume=False, loss="mean", epochs=1, **rates)
    rows = [
        fit(replace(config, micro_batches=n), patients, tmp_path, progress=False).history.iloc[0]
        for n in (1, 2, 4)
    ]
    for row in rows[1:]:
        assert np.allclose(row[["loss_ct", "loss_severity"]], rows[0][["loss_ct", "loss_severity"]])


def test_numpys_numbers_in_the_recipe_can_be_kept(tmp_path: Path) -> None:
    config = replace(SMALL, use_volume=False, epochs=np.int64(1), learning_rate=np.float64(0.02))
    trained = fit(config, cohort(), tmp_path, progress=False)
    assert load(trained.folder / "last.pt", "cpu").config == config


def test_history_that_was_not_written_is_written_later(tmp_path: Path) -> None:
    quick = replace(SMALL, use_volume=False, epochs=2)
    path = fit(quick, cohort(), tmp_path, progress=False).folder / "history.csv"
    whole = path.read_text()
    path.write_text(whole.splitlines()[0])
    fit(quick, cohort(), tmp_path, progress=False)
    assert path.read_text() == whole


def test_a_damaged_volume_is_named_from_a_worker_too(tmp_path: Path) -> None:
    source = preprocessed(tmp_path, cohort(4))
    scans, _, volumes = store.load_preprocessed(source)
    lost = volumes["p2"] / "lungs.b2nd"
    patients = Patients(scans[["ct", "severity"]], volumes=volumes)
    config = replace(SMALL, use_features=False, standardise="paper", workers=1, crop=(40, 40, 40))
    lost_bytes = lost.read_bytes()

    def damage(*_: object) -> str:
        lost.write_bytes(lost_bytes[:100])
        return "key"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_key", damage)
        with pytest.raises(
            DataError, match=r"^\S*p2/lungs\.b2nd is damaged or of another kind: \D*$"
        ):
            fit(config, patients, tmp_path / "runs", progress=False)


def test_a_bit_that_flips_on_the_disk_stops_a_training_that_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = preprocessed(tmp_path, cohort(6))
    scans, _, volumes = store.load_preprocessed(source)
    patients = Patients(scans[["ct", "severity"]], volumes=volumes)
    config = replace(SMALL, use_features=False, workers=0, crop=(40, 40, 40))
    alone = fit(config, patients, tmp_path / "alone", progress=False)
    path = volumes["p3"] / "volume.b2nd"
    whole, keep = path.read_bytes(), training._Run._keep
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 4

    def keep_and_flip(run: training._Run, row: dict) -> None:  # type: ignore[type-arg]
        keep(run, row)
        path.write_bytes(flipped)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_keep", keep_and_flip)
        with pytest.raises(DataError, match=r"p3/volume\.b2nd is damaged inside"):
            fit(config, patients, tmp_path / "runs", progress=False)
    path.write_bytes(whole)
    ended = fit(config, patients, tmp_path / "runs", progress=False)
    assert numbers(ended.history) == numbers(alone.history)
    pd.testing.assert_frame_equal(predict(ended, patients), predict(alone, patients))


def test_another_seed_or_data_is_another_training(tmp_path: Path) -> None:
    quick = replace(SMALL, use_volume=False, epochs=1)
    folders = {
        fit(config, patients, tmp_path, progress=False).folder
        for config, patients in (
            (quick, cohort()),
            (replace(quick, workers=0), cohort()),
            (replace(quick, seed=1), cohort()),
            (quick, cohort(seed=1)),
            (replace(quick, tasks={"severity": 3, "ct": 2}), cohort()),
        )
    }
    folders.add(fit(quick, cohort(), tmp_path, cohort(seed=2), progress=False).folder)
    assert len(folders) == 5


def test_parts_of_a_batch_give_the_same_step_where_nothing_is_normalised(tmp_path: Path) -> None:
    config = replace(SMALL, use_volume=False, batch_size=5)
    one, two = (
        fit(replace(config, micro_batches=n), cohort(), tmp_path, progress=False) for n in (1, 2)
    )
    assert np.allclose(one.history["loss"], two.history["loss"], rtol=1e-5)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_refreshed_norms_are_those_of_the_training_patients(tmp_path: Path) -> None:
    config = replace(SMALL, refresh_norms=True, batch_size=10, epochs=1)
    trained = fit(config, cohort(), tmp_path, progress=False)
    first = trained.model.trunk.stem.conv
    batch = cohort().cropped(SMALL.crop).__getitems__([(i, None) for i in range(10)])
    mean, sd = trained.scaling["volume"]
    with torch.no_grad():
        maps = first.conv(((batch["volume"] - mean) / sd).float())
    assert isinstance(first.norm, nn.BatchNorm3d) and first.norm.momentum == 0.01
    assert torch.allclose(first.norm.running_mean, maps.mean((0, 2, 3, 4)), atol=1e-4)


def test_the_best_epoch_is_kept_when_there_are_patients_to_judge_by(tmp_path: Path) -> None:
    config = replace(SMALL, use_volume=False, epochs=6, learning_rate=0.5)
    trained = fit(config, cohort(), tmp_path, validation=cohort(seed=5), progress=False)
    history = trained.history
    losses = history["validation_loss"]
    each = history[["validation_loss_ct", "validation_loss_severity"]]
    assert np.allclose(losses, each.mean(axis=1)) and history["validation_accuracy_ct"].max() <= 1
    best = load(trained.folder / "best.pt", "cpu")
    assert len(best.history) == losses.argmin() + 1


def test_learning_rate_falls_from_the_papers_first_to_its_last() -> None:
    rates = [TrainConfig().learning_rate_of(epoch) for epoch in range(80)]
    assert rates[0] == 0.005 and rates[-1] == pytest.approx(5e-5) and rates == sorted(rates)[::-1]


TWO_PROCESSES = """
import json, os, sys
from dataclasses import replace
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_training import SMALL, cohort, numbers
from covidmtl_core.training import fit
torch_rank = int(os.environ["RANK"])
trained = fit(replace(SMALL, loss={loss!r}, batch_size=5), cohort(), {folder!r}, progress=False)
if torch_rank == 0:
    print(json.dumps(trained.history["loss"].tolist()), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["random", "uncertainty"])
def test_two_processes_equal_one_that_normalises_half_batches(tmp_path: Path, loss: str) -> None:
    program = tmp_path / "two.py"
    tests = str(Path(__file__).parent)
    program.write_text(TWO_PROCESSES.format(tests=tests, loss=loss, folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(program)], capture_output=True, text=True, env=quiet, timeout=300
    )
    assert done.returncode == 0, done.stderr
    config = replace(SMALL, loss=loss, batch_size=5, micro_batches=2)
    alone = fit(config, cohort(), tmp_path / "one", progress=False)
    shared = json.loads(done.stdout.splitlines()[-1])
    assert np.allclose(shared, alone.history["loss"], rtol=2e-4)
    whole = fit(replace(config, micro_batches=1), cohort(), tmp_path / "one", progress=False)
    assert not np.allclose(shared, whole.history["loss"], rtol=1e-3)


KILLED = """
import multiprocessing, os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from dataclasses import replace
from test_training import SMALL, cohort, numbers
from covidmtl_core.training import fit
config, folder = replace(SMALL, epochs=6), {folder!r}
begun = time.perf_counter()
whole = fit(config, cohort(), folder + "/whole", progress=False)
seconds = time.perf_counter() - begun
fork = multiprocessing.get_context("fork")
rng, kills = random.Random(0), 0
while kills < 20:
    child = fork.Process(target=fit, args=(config, cohort(), folder + "/parts"),
                         kwargs=dict(progress=False))
    child.start()
    child.join(rng.uniform(0.05, 0.35) * seconds)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    else:
        assert child.exitcode == 0
        import shutil
        shutil.rmtree(folder + "/parts")
parts = fit(config, cohort(), folder + "/parts", progress=False)
assert numbers(parts.history) == numbers(whole.history)
for a, b in zip(parts.model.state_dict().values(), whole.model.state_dict().values()):
    assert torch.equal(a, b)
"""


@pytest.mark.slow
def test_killed_at_twenty_random_points_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    program = KILLED.format(tests=tests, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_a_loss_that_is_no_number_names_the_batch(tmp_path: Path) -> None:
    config = replace(SMALL, use_volume=False, learning_rate=1e30, batch_size=5)
    with pytest.raises(TrainingError, match=r"epoch \d, batch \d \(patients p\d+, p\d+"):
        fit(config, cohort(), tmp_path, progress=False)


def test_a_last_batch_that_cannot_be_normalised_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"maps of one voxel.*4 of 5 patients"):
        fit(SMALL, cohort(5), tmp_path, progress=False)


def test_exhausted_memory_is_answered_with_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(training._Run, "_one_step", fail)
    with pytest.raises(TrainingError, match=r"checkpointing to true .* micro_batches to 2"):
        fit(SMALL, cohort(), tmp_path, progress=False)


def test_a_full_disk_keeps_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = replace(SMALL, use_volume=False, epochs=3)
    save, calls = torch.save, []

    def fail(saved: dict, stream: object) -> None:
        calls.append(saved["epoch"])
        if saved["epoch"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(saved, stream)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(DataError, match=r"last\.pt cannot be written .*No space.*call again"):
        fit(quick, cohort(), tmp_path, progress=False)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "history.csv", "last.pt"]
    monkeypatch.undo()
    again = fit(quick, cohort(), tmp_path, progress=False)
    whole = fit(quick, cohort(), tmp_path / "whole", progress=False)
    assert numbers(again.history) == numbers(whole.history)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        fit(quick, cohort(), tmp_path / "file", progress=False)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    quick = replace(SMALL, use_volume=False, epochs=1)
    trained = fit(quick, cohort(), tmp_path, progress=False)
    lock = FileLock(trained.folder / ".lock")
    with lock, pytest.raises(DataError, match="Another run is training"):
        fit(quick, cohort(), tmp_path, progress=False)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    quick = replace(SMALL, use_volume=False, epochs=1)
    path = fit(quick, cohort(), tmp_path, progress=False).folder / "last.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for call in (lambda: load(path), lambda: fit(quick, cohort(), tmp_path, progress=False)):
        with pytest.raises(DataError, match=r"last\.pt is damaged: delete it"):
            call()
    with pytest.raises(DataError, match=r"no\.pt is missing"):
        load(tmp_path / "no.pt")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "unet"}, "'unet'"),
        ({"model": "shiftnet3d"}, "one task"),
        ({"model": "decovnet", "tasks": {"ct": 2}, "use_features": True}, "takes volumes only"),
        ({"epochs": 0}, "epochs is 0"),
        ({"crop": (3, 4)}, r"crop is \(3, 4\)"),
        ({"min_learning_rate": 1.0}, "min_learning_rate is 1.0"),
        ({"shift_p": 2.0}, "Shift3D's p is 2.0"),
        ({"use_volume": False}, "both false"),
        ({"weight_decay": "abc"}, "weight_decay is 'abc'"),
        ({"shift": "false"}, "shift is 'false'"),
        ({"workers": -1}, "workers is -1"),
        ({"tasks": ["ct"]}, r"tasks are \['ct'\]"),
        ({"crop": 100}, "crop is 100"),
        ({"augmentation": 1}, "must be an Augmentation"),
    ],
)
def test_parameters_that_cannot_be_used(changes: dict, named: str) -> None:
    with pytest.raises(ParameterError, match=named):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tasks": {"nat": 2}}, "no label 'nat'"),
        ({"tasks": {"severity": 2}}, "a patient's is 2"),
        ({"precision": "bf16"}, "a CPU trains in float32 only"),
    ],
)
def test_parameters_that_do_not_fit_the_patients(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ParameterError, match=named):
        fit(replace(SMALL, **changes), cohort(), tmp_path)
    lone = Patients(pd.DataFrame({"ct": [1]}, index=["a"]), pd.DataFrame({"x": [1.0]}, index=["a"]))
    with pytest.raises(ParameterError, match="no volumes"):
        fit(SMALL, lone, tmp_path)


def test_settings_from_texts() -> None:
    texts = ["epochs=2", "crop=[8, 9, 10]", "shift=no", "min_learning_rate=5e-6"]
    config = TrainConfig.from_texts([*texts, "augmentation={flip: 0.5}", "tasks={ct: 2}"])
    assert (config.epochs, config.crop, config.shift) == (2, (8, 9, 10), False)
    assert config.min_learning_rate == 5e-6 and config.augmentation.flip == 0.5
    for text, named in (("speed=2", "'speed=2'"), ("epochs", "'epochs'"), ("crop=[", "understood")):
        with pytest.raises(ParameterError, match=named):
            TrainConfig.from_texts([text])
    texts = ["learning_rate=1E-3", "min_learning_rate=1e-5", "augmentation=no", "seed=3"]
    config = TrainConfig.from_texts(texts)
    assert (config.learning_rate, config.min_learning_rate) == (1e-3, 1e-5)
    assert config.augmentation is None and config.seed == 3
    with pytest.raises(ParameterError, match="flip_axis is 7"):
        TrainConfig.from_texts(["augmentation={flip_axis: 7}"])
    assert TrainConfig.as_released(epochs=1).shuffle is False


def preprocessed(folder: Path, patients: Patients) -> Path:
    """A folder as `covidmtl preprocess` leaves it."""
    labels = pd.DataFrame({t: v.numpy() for t, v in patients.labels.items()}, index=patients.ids)
    table = labels.assign(nat=labels["ct"], state="ready")
    table["split"] = ["train" if k < 7 else "test" for k in range(len(table))]
    for p, volume in zip(patients.ids, patients.volumes, strict=True):
        place = folder / "scans" / p
        place.mkdir(parents=True)
        store.write(sitk.GetImageFromArray(volume), place / "volume.b2nd")
        lungs = np.ones(volume.shape, np.uint8)
        store.write(sitk.GetImageFromArray(lungs), place / "lungs.b2nd")
    table.to_csv(folder / "scans.csv", index_label="patient_id")
    features = pd.DataFrame(patients.features.numpy(), index=patients.ids)
    features.to_csv(folder / "features.csv", index_label="patient_id")
    return folder


def test_the_command_line_trains_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = preprocessed(tmp_path / "ready", cohort(12))
    config = replace(SMALL, epochs=1, workers=1)
    runs.train(source, tmp_path / "runs", config, "cpu")
    assert "accuracy" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    predicted = pd.read_csv(folder / "predictions.csv", index_col="patient_id")
    assert len(predicted) == 5
    every = runs.predict(folder / "last.pt", source, "cpu")
    assert len(every) == 12 and np.allclose(every.loc[predicted.index], predicted, atol=1e-5)
    in_memory = cohort(12)
    scans, _, _ = store.load_preprocessed(source)
    train = scans.index[scans["split"] == "train"]
    same = Patients(
        pd.DataFrame({t: v.numpy() for t, v in in_memory.labels.items()}, index=in_memory.ids).loc[
            train
        ],
        pd.DataFrame(in_memory.features.numpy(), index=in_memory.ids),
        dict(zip(in_memory.ids, in_memory.volumes, strict=True)),
    )
    alone = fit(replace(config, workers=0), same, tmp_path / "memory", progress=False)
    assert numbers(pd.read_csv(folder / "history.csv")) == numbers(alone.history)
    table = pd.read_csv(source / "scans.csv", index_col="patient_id")
    table.assign(split="train").to_csv(source / "scans.csv")
    with pytest.raises(DataError, match="12 are for training and 0 for testing"):
        runs.train(source, tmp_path / "runs", config)
    with pytest.raises(DataError, match=r"scans\.csv is missing"):
        runs.train(tmp_path, tmp_path / "runs", config)


def test_doctor_says_what_the_machine_can_train() -> None:
    lines = list(runs.doctor())
    assert "torch" in lines[0] and any("takes" in line and "h" in line for line in lines)


@pytest.mark.slow
def test_covid_mtl_learns_from_phantoms(tmp_path: Path) -> None:
    """CT AUC at least 0.85 on phantoms it has not seen, from volumes alone, at quick size."""
    rng = np.random.default_rng(0)
    ids = list(range(30))
    ct = rng.permutation(ids) % 2
    burden = np.where(ct, np.clip(0.06 * np.exp(0.8 * rng.normal(size=30)), 0.01, 0.4), 0.0)
    volumes = {}
    for k in ids:
        made = make_phantom(draw_patient(k, float(burden[k])), (42, 49, 49), 8.0)
        lungs = sitk.GetArrayViewFromImage(made.lungs) > 0
        masked = np.where(lungs, sitk.GetArrayViewFromImage(made.image), -1024)
        volumes[k] = masked[bounds(lungs, 1)].astype(np.int16)
    labels = pd.DataFrame({"ct": ct, "severity": ct + (burden > 0.1)}, index=ids)
    config = replace(
        SMALL, use_features=False, crop=(34, 28, 34), epochs=12, shift_p=0.25, refresh_norms=True
    )
    trained = fit(config, Patients(labels[:20], volumes=volumes), tmp_path, progress=False)
    found = predict(trained, Patients(labels[20:], volumes=volumes))
    assert roc_auc_score(ct[20:], found["ct_1"]) >= 0.85


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_trains_on_the_card_and_goes_on(tmp_path: Path, precision: str) -> None:
    config = replace(SMALL, precision=precision)
    trained = fit(config, cohort(), tmp_path, device="cuda", progress=False)
    again = fit(replace(config), cohort(), tmp_path, device="cuda", progress=False)
    assert np.isfinite(trained.history["loss"]).all()
    assert numbers(again.history) == numbers(trained.history)
    assert predict(trained, cohort(3)).shape == (3, 5)
