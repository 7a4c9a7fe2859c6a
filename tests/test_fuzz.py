"""Whatever stands in a file or a parameter: an answer, or one of our errors, and nothing else."""

import json
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from covidmtl_core import book, claims, data_folder, experiments, fetch, phantom, store, training
from covidmtl_core.ct import read_ct, write_volume
from covidmtl_core.dicom import write_series
from covidmtl_core.errors import CovidMTLError
from covidmtl_core.recipe import TrainConfig

pytestmark = pytest.mark.slow

some = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "drop", "insert", "cut"]), st.floats(0, 1), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=4,
)
at_the_head = st.lists(
    st.tuples(st.just("set"), st.integers(0, 400), st.binary(min_size=1, max_size=4)), min_size=1
)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)


def edited(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes set, dropped, inserted or cut off at places given as shares, or counted from 0."""
    for kind, place, new in changes:
        at = place if isinstance(place, int) else int(place * len(data))
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[:at] + (new if kind == "set" else b"") + data[at + len(new) :]
    return data


def answers(call: Any, *arguments: Any) -> bool:
    """Did it answer? False if it raised one of our errors; any other error is the test's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(*arguments)
    except CovidMTLError as error:
        assert 0 < len(str(error)) < 2000
        return False
    return True


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    patient = phantom.draw_patient(1, 0.2)
    image = phantom.make_phantom(patient, size=[24, 32, 32], spacing_mm=[12, 10, 10]).image
    write_series(image, folder / "series")
    for name in ("a.nii", "a.nii.gz", "a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(folder / name))
    write_volume(image, folder / "a")
    slices = sorted((folder / "series").iterdir(), key=lambda f: pydicom.dcmread(f).InstanceNumber)
    packed = BytesIO()
    torch.save([s.read_bytes() for s in slices], packed)
    return {"series": packed.getvalue()} | {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
    }


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a"])
@given(changes=edits | at_the_head)
@some
def test_a_changed_scan_is_read_or_refused(
    name: str, changes: list, scans: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(edited(scans[name], changes))
    answers(read_ct, path)
    assert [p.name for p in tmp_path.iterdir()] == [name], "reading writes nothing"


@given(changes=edits | at_the_head, which=st.integers(0, 23))
@some
def test_a_series_with_a_changed_slice_is_read_or_refused(
    changes: list, which: int, scans: dict[str, bytes], tmp_path: Path
) -> None:
    slices = torch.load(BytesIO(scans["series"]), weights_only=True)
    for number, data in enumerate(slices):
        changed = edited(data, changes) if number == which else data
        (tmp_path / f"{number}.dcm").write_bytes(changed)
    answers(read_ct, tmp_path)


@given(changes=edits)
@some
def test_a_changed_checkpoint_is_loaded_or_refused(
    changes: list, checkpoint: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(edited(checkpoint, changes))
    answers(training.load, path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    table = pd.DataFrame({"ct": [0, 1]}, index=[1, 2])
    features = pd.DataFrame({"a": [0.0, 1.0]}, index=[1, 2])
    config = TrainConfig(
        tasks={"ct": 2}, use_volume=False, use_features=True, epochs=1, batch_size=2
    )
    trained = training.fit(
        config, store.Patients(table, features), tmp_path_factory.mktemp("run"), progress=False
    )
    return (trained.folder / "last.pt").read_bytes()


@given(text=st.text(max_size=200) | st.binary(max_size=200))
@some
def test_any_labels_are_read_or_refused(text: str | bytes, tmp_path: Path) -> None:
    head = "patient_id,path,ct,nat,severity\n"
    content = text if isinstance(text, bytes) else (head + text).encode("utf-8", "surrogatepass")
    (tmp_path / "labels.csv").write_bytes(content)
    answers(data_folder.check, tmp_path)
    answers(data_folder.load_index, tmp_path)


@given(
    content=json_values
    | st.dictionaries(st.sampled_from(sorted(claims.Record.__dataclass_fields__)), json_values)
)
@some
def test_any_record_is_read_or_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    for whole in (content, {"claims": content}, {"claims": [content]}):
        path.write_text(json.dumps(whole))
        answers(claims.load_records, tmp_path)


@pytest.mark.parametrize(("name", "read"), [("registry.yml", "registry"), ("paper_claims.yml", "")])
@given(
    place=st.integers(0, 9),
    key=st.sampled_from(["id", "file", "urls", "bytes", "value", "kind", "place", "check", "x"]),
    value=json_values,
)
@some
def test_any_manifest_is_read_or_refused(
    name: str, read: str, place: int, key: str, value: Any
) -> None:
    whole = fetch.load_manifest(name)
    rows = whole["files"] if read else whole
    rows[place % len(rows)][key] = value
    with pytest.MonkeyPatch.context() as patch:
        for module in (fetch, claims):
            patch.setattr(module, "load_manifest", lambda _: whole)
        function = fetch.registry if read else claims.load_claims
        if answers(function.__wrapped__) and read:  # type: ignore[attr-defined]
            for entry in function.__wrapped__().values():  # type: ignore[attr-defined]
                assert (fetch.cache_folder() / entry.file).parent == fetch.cache_folder()


@given(
    tier=st.sampled_from(["phantom", "released", "volumes"]) | json_values,
    name=st.sampled_from(["seed", "n_trees", "n_trainings", "data_root", "networks", "settings"]),
    value=json_values,
)
@some
def test_any_parameter_of_a_chapter_is_taken_or_refused(tier: Any, name: str, value: Any) -> None:
    answers(lambda: book.start("diagnosis", tier, **{name: value}))


@given(settings=st.dictionaries(st.sampled_from(["epochs", "crop", "x"]) | st.text(), json_values))
@some
def test_any_settings_of_a_study_are_taken_or_refused(settings: dict, tmp_path: Path) -> None:
    scans = experiments.Scans(*[pd.DataFrame()] * 2, {}, *[pd.Index([])] * 2, "phantom")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        study = experiments.Study(scans, {}, tmp_path)
        patch.setattr(experiments, "phantom_study", lambda *_, **__: study)
        answers(lambda: experiments.study("phantom", 40, 1, settings=settings))


@given(
    name=st.sampled_from([*TrainConfig.__dataclass_fields__, "lr", ""]),
    value=st.text(max_size=20) | st.sampled_from(["!!python/object/apply:os.getcwd []", "&a [*a]"]),
)
@some
def test_any_setting_is_taken_or_refused(name: str, value: str) -> None:
    answers(TrainConfig.from_texts, [f"{name}={value}"])


@given(name=st.sampled_from([*TrainConfig.__dataclass_fields__]), value=json_values)
@some
def test_any_value_of_a_setting_is_taken_or_refused(name: str, value: Any) -> None:
    answers(lambda: TrainConfig(**{name: value}))
