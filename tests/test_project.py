"""Packaging: the files that must say the same thing do, and the wheel works on its own."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from covidmtl_core import __version__, book, pages

CONDA_NAMES = {
    "blosc2": "python-blosc2",
    "matplotlib": "matplotlib-base",
    "SimpleITK": "simpleitk",
    "snakemake": "snakemake-minimal",
    "torch": "pytorch",
    "types-PyYAML": "types-pyyaml",
}
PYRADIOMICS_NEEDS = {"docopt", "pykwalify", "pywavelets", "six"}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def requirements(project: dict) -> dict[str, str]:
    lists = [project["project"]["dependencies"]]
    lists += project["project"]["optional-dependencies"].values()
    pairs = (re.fullmatch(r"([\w-]+)(.*)", text).groups() for group in lists for text in group)  # type: ignore[union-attr]
    return dict(pairs)


def test_conda_environment_asks_for_the_same(repository: Path, project: dict) -> None:
    environment = yaml.safe_load((repository / "environment.yml").read_text())
    *packages, of_pip = environment["dependencies"]
    packages += of_pip["pip"]
    conda = dict(re.fullmatch(r"([\w-]+)(.*)", text).groups() for text in packages)  # type: ignore[union-attr]
    assert conda.pop("python") == "=3.11"
    assert conda.pop("setuptools") == ">=77" and conda.pop("pip") == ""
    assert {name for name in conda if name in PYRADIOMICS_NEEDS} == PYRADIOMICS_NEEDS
    rest = {name: bound for name, bound in conda.items() if name not in PYRADIOMICS_NEEDS}
    assert rest == {CONDA_NAMES.get(n, n): bound for n, bound in requirements(project).items()}


def test_runtime_dependencies_have_lower_bounds_only(project: dict) -> None:
    for text in project["project"]["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", text), text
    bounds = requirements(project)
    assert bounds.pop("jupyter-book") == ">=1.0.4,<2"
    assert all(re.fullmatch(r">=[\d.]+", bound) for bound in bounds.values())


def test_lock_file_pins_every_dependency(repository: Path, project: dict) -> None:
    lines = (repository / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in pins)
    names = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins}
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in requirements(project)}
    assert wanted - {"torch"} <= names and not {"torch", "pyradiomics"} & names


def test_version_is_said_once_or_the_same(repository: Path, project: dict) -> None:
    assert project["project"]["version"] == __version__
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == __version__


def test_address_stands_in_one_place(repository: Path, project: dict) -> None:
    address = project["project"]["urls"]["Repository"]
    assert pages.address() == address
    name = address.removeprefix("https://")
    tracked = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    for file in map(repository.joinpath, tracked.stdout.splitlines()):
        if not file.is_file() or file.suffix in (".xz", ".png"):
            continue
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".ipynb":  # `make notebooks` writes their first code cell
            cells = json.loads(text)["cells"]
            assert "".join(cells[1]["source"]) == pages.set_up_cell(), file.name
            text = json.dumps(cells[:1] + cells[2:])
        assert (name in text) == (file.name == "pyproject.toml"), file


@pytest.mark.slow
def test_wheel_alone_has_the_manifest_and_needs_no_extra(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    ignored = subprocess.run(
        ["git", "-C", str(repository), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ignored.stdout.splitlines():
        if name.startswith(
            (
                "covidmtl_core/",
                "data_manifest/",
                "tests/benchmarks/",
                "pyproject",
                "README",
                "LICENSE",
            )
        ):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((repository / name).read_bytes())
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "covidmtl_core/data_manifest/registry.yml" in names
    assert "covidmtl_core/data_manifest/paper_claims.yml" in names
    assert "covidmtl_core/data_manifest/phantom_features.csv.xz" in names
    assert not [name for name in names if name.startswith(("tests", "book", "data_manifest/"))]
    program = (
        "import sys\n"
        "optional = ('lightgbm', 'statsmodels', 'torch', 'radiomics', 'SimpleITK', 'matplotlib',\n"
        "            'seaborn', 'IPython', 'papermill', 'pydicom', 'skimage', 'cc3d', 'edt')\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in optional:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from covidmtl_core import (baselines, book, claims, cli, cohort, evaluation, fetch,\n"
        "                           hypothesis_tests, phantom_cohort, style)\n"
        "assert claims.__file__.startswith(sys.argv[1]), claims.__file__\n"
        "assert len(claims.load_claims()) > 100 and len(fetch.registry()) > 5\n"
        "patients = cohort.load_cohort('phantom')\n"
        "assert len(cohort.load_features('phantom')) == len(patients)\n"
        "try:\n"
        "    hypothesis_tests.welch_anova(patients[['age']], patients['ct'])\n"
        "except ImportError as error:\n"
        "    assert 'pip install statsmodels' in str(error)\n"
        "else:\n"
        "    raise SystemExit('statsmodels was not missing')\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site")], check=True, cwd=tmp_path
    )


@pytest.mark.parametrize(
    ("record", "figure", "least", "most"),
    [
        ("segmentation_speed", "released against plain", 15, 1000),
        ("segmentation_speed", "voxels that differ", 0, 0),
        ("features_speed", "fast against released", 10, 1000),
        ("features_speed", "peak memory of fast, GiB", 0, 3),
        ("features_speed", "largest relative difference", 0, 1e-8),
        ("shift3d_speed", "fast, every sample, against two clones", 0, 1.2),
        ("shift3d_speed", "fast, 1 sample, against two clones", 0, 1.1),
        ("shift3d_speed", "plain, every sample, against two clones", 0, 2.5),
        ("shift3d_speed", "plain, 1 sample, against two clones", 0, 1.6),
        ("shift3d_speed", "loop against fast", 100, 10_000),
        ("shift3d_speed", "fused stem against ReLU and max-pool", 0, 0.4),
        ("models_speed", "training step against plain", 0, 0.9),
        ("models_speed", "peak memory against plain", 0, 0.9),
        ("models_speed", "inference against plain", 0, 0.55),
        ("models_speed", "compiled inference against plain", 0, 0.45),
        ("training_cost", "store against slices, times as fast", 10, 1000),
        ("training_cost", "store against slices, size", 0, 1),
        ("training_cost", "peak memory of a step, GiB", 0.5, 2.5),
        ("models_speed", "one multitask against three single-task", 0, 0.36),
    ],
)
def test_recorded_figures_keep_what_was_promised(
    record: str, figure: str, least: float, most: float
) -> None:
    recorded = book.recorded(record)
    assert recorded is not None and least <= recorded[figure] <= most
    assert not recorded["commit"].endswith("-dirty"), "measure at a clean commit"
