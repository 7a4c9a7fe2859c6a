import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from covidmtl_core import book, cohort, experiments, store
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.experiments import CATALOGUE, Scans, Study

SEED = 3


def small_study(folder: Path, n: int = 24, classical: bool = False) -> Study:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"ct": [k % 2 for k in range(n)], "nat": [k // 2 % 2 for k in range(n)]},
        index=range(100, 100 + n),
    )
    table["severity"] = [k % 3 for k in range(n)]
    features = pd.DataFrame(rng.normal(size=(n, 6)), index=table.index)
    features[0] += 3 * table["ct"]
    volumes = {
        p: rng.integers(-900, 0, (36, 36, 36)).astype(np.int16) + 200 * int(table["ct"][p])
        for p in table.index
    }
    scans = Scans(table, features, volumes, table.index[:16], table.index[16:], "phantom")  # type: ignore[arg-type]
    settings = {"epochs": 2, "crop": (33, 33, 33), "jitter": (1, 1, 1), "batch_size": 8}
    return Study(scans, settings, folder, (lambda: scans) if classical else None, "cpu")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_experiment_has_a_recipe_and_a_title(name: str, tmp_path: Path) -> None:
    config = small_study(tmp_path).config(name, SEED)
    assert config.seed == SEED and config.momentum == 0.9
    assert all(word[0] != "." for word in experiments.title(name).split())


def test_titles_say_what_was_changed() -> None:
    assert experiments.title("shiftnet3d.nat.gaussian") == "ShiftNet3D, Gaussian shifts"
    assert experiments.title("covid_mtl.mean.noshift") == "COVID-MTL, mean loss, without Shift3D"
    assert experiments.title("covid_mtl.p-50") == "COVID-MTL, p = 0.5"


def test_results_hold_what_was_asked_and_come_twice_alike(tmp_path: Path) -> None:
    names = ["covid_mtl.features", "squeezenet3d.ct"]
    first = small_study(tmp_path / "a").run(names, [SEED], progress=False)
    again = small_study(tmp_path / "b").run(names, [SEED], progress=False)
    kept = small_study(tmp_path / "a").run(names, [SEED], progress=False)
    for name in ("predictions", "history"):
        whole = getattr(first, name).to_csv()
        assert whole == getattr(again, name).to_csv() == getattr(kept, name).to_csv()
    measured = first.metrics()
    assert set(measured.index) == {
        ("squeezenet3d.ct", "ct", SEED),
        *(("covid_mtl.features", task, SEED) for task in cohort.TASKS),
    }
    y, p = first.probabilities("covid_mtl.features", SEED, "severity")
    assert p.shape == (8, 3) and (y == [k % 3 for k in range(16, 24)]).all()
    assert not list(tmp_path.rglob("best.pt")), "test patients choose nothing"
    assert {"test_loss", "test_accuracy_ct"} <= set(first.history)


def test_transfer_starts_from_the_diagnosis_network_and_leaves_its_trunk(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    trained = study.train("transfer", SEED, progress=False)
    before = study.train("diagnosis", SEED, progress=False).model.trunk.state_dict()  # type: ignore[union-attr]
    after = trained.model.trunk.state_dict()  # type: ignore[union-attr]
    assert all((after[name] == value).all() for name, value in before.items())
    assert list(trained.config.tasks) == ["severity"]
    with pytest.raises(ParameterError, match="go together"):
        config = replace(study.config("diagnosis", SEED), tasks={"severity": 3}, frozen_trunk=True)
        experiments.fit(config, study.scans.patients(study.scans.train, config), tmp_path)


def test_a_grid_is_its_trainings_and_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small_study(tmp_path / "runs")
    names = ["covid_mtl.features_only", "covid_mtl.features_only.mean"]
    found = experiments.grid(study, names, range(2))
    alone = study.run(names[:1], [1], progress=False)
    one = found.predictions.xs((names[0], 1), drop_level=False)
    pd.testing.assert_frame_equal(one, alone.predictions)
    (tmp_path / "book" / "recorded").mkdir(parents=True)
    monkeypatch.setattr(book, "repository_folder", lambda: tmp_path)
    experiments.record(found, study, 6.0)
    read = experiments.recorded()
    assert read is not None
    assert "16 to train, 8 to test, 6 mm, 2 epochs, 4 trainings with seeds 0, 1;" in read.source
    pd.testing.assert_frame_equal(read.metrics(), found.metrics())
    experiments.record(study.run(names[:1], [1, 2], progress=False), study, 6.0)
    more = experiments.recorded()
    assert more is not None and len(more.costs) == 5
    same = more.metrics().drop(2, level="seed").sort_index()
    pd.testing.assert_frame_equal(same, found.metrics().sort_index())
    experiments.record(alone, replace(study, settings=study.settings | {"epochs": 3}), 6.0)
    other = experiments.recorded()
    assert other is not None and len(other.costs) == 1, "other settings begin a record anew"
    with pytest.raises(ParameterError, match="minutes"):
        experiments.grid(study, names, minutes=-1)


def test_wrong_names_and_missing_lungs_are_said(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    with pytest.raises(ParameterError, match="no experiment 'covid'"):
        study.config("covid", 0)
    with pytest.raises(ParameterError, match="classical"):
        study.train("covid_mtl.classical", 0)
    with pytest.raises(ParameterError, match="give a list"):
        study.run("covid_mtl")
    with pytest.raises(ParameterError, match=r"no experiment 'shiftnet3d\.cta'"):
        study.run(["covid_mtl", "shiftnet3d.cta"])
    assert not list(study.folder.rglob("*.pt")), "said before anything is trained"
    with pytest.raises(ParameterError, match="from 20 to 304"):
        experiments.phantom_scans(7)
    with pytest.raises(ParameterError, match="data_root"):
        experiments.study("volumes", 10, 1)
    with pytest.raises(DataError, match=r"scans\.csv"):
        experiments.study("volumes", 10, 1, tmp_path)


def test_a_class_without_a_test_patient_is_said_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = small_study(tmp_path).scans.table
    table["split"] = ["test" if k < 6 else "train" for k in range(len(table))]
    monkeypatch.setattr(experiments, "load_cohort", lambda *_: table)
    table.loc[table["split"] == "test", "severity"] = 1
    with pytest.raises(DataError, match=r"fewer than two test patients of severity 0"):
        experiments.study("volumes", 1, 1, tmp_path)


def test_phantoms_are_made_once_and_segmented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVIDMTL_RESULTS", str(tmp_path))
    volumes = experiments.other_scanner_scans(2, mm=8.0)
    for folder in volumes.values():
        lungs, lesions = (store.read(folder / f"{n}.b2nd") for n in ("lungs", "lesions"))
        assert lungs.GetSize() == lesions.GetSize()
    times = [(folder / "done").stat().st_mtime_ns for folder in volumes.values()]
    again = experiments.other_scanner_scans(2, mm=8.0)
    assert times == [(folder / "done").stat().st_mtime_ns for folder in again.values()]


def test_settings_change_the_recipe_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "phantom_scans", lambda n, mm: small_study(tmp_path).scans)
    changed = experiments.study("phantom", 24, 2, settings={"micro_batches": 2, "crop": [9, 8, 7]})
    config = changed.config("covid_mtl", SEED)
    assert (config.micro_batches, config.crop, config.epochs) == (2, (9, 8, 7), 2)
    for settings, said in (
        ({"batchsize": 2}, "batchsize"),
        ({"micro_batches": 0}, "micro_batches"),
    ):
        with pytest.raises(ParameterError, match=said):
            experiments.study("phantom", 24, 2, settings=settings)


@pytest.mark.usefixtures("released")
def test_only_the_papers_own_scans_are_the_papers(tmp_path: Path) -> None:
    scans = small_study(tmp_path).scans
    table = cohort.load_cohort("released")[list(cohort.TASKS)]
    train, test = cohort.split(table)
    made = {"spacing_mm": 1.0, "method": "refined"}
    whole = Scans(table, scans.features, {}, train, test, "volumes", made)
    assert whole.are_the_papers and not scans.are_the_papers
    by_text = table.set_axis(table.index.astype(str)).sort_index()
    other = Scans(by_text, scans.features, {}, *cohort.split(by_text), "volumes", made)
    assert not other.are_the_papers, "another order, and so other test patients"
    assert not replace(whole, preprocessing=made | {"method": "classical"}).are_the_papers
    assert not replace(whole, preprocessing=made | {"spacing_mm": 2.0}).are_the_papers
    settings = {"epochs": 80, "micro_batches": 2, "crop": [200, 250, 250]}
    assert Study(whole, settings, tmp_path).is_the_papers
    for change in ({"epochs": 1}, {"micro_batches": 5}):
        assert not Study(whole, settings | change, tmp_path).is_the_papers


@pytest.mark.parametrize("name", ["covid_mtl.features_only", "covid_mtl"])
def test_results_are_the_same_bytes_in_another_process(name: str, tmp_path: Path) -> None:
    tables = []
    # Features alone whatever the number of threads; networks on volumes with the same.
    for threads in ("1", "2" if "features" in name else "1"):
        folder = tmp_path / str(len(tables))
        code = (
            "from pathlib import Path; from test_experiments import small_study;"
            f"found = small_study(Path({str(folder)!r})).run([{name!r}], [{SEED}], False);"
            f"found.predictions.to_csv({str(folder) + '.csv'!r})"
        )
        here = Path(__file__).parent
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(here)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
        tables.append(Path(f"{folder}.csv").read_bytes())
    assert tables[0] == tables[1]
