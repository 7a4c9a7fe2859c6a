"""The whole engine on phantoms: Snakemake, papermill, Jupyter Book, and what it does on failure."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from covidmtl_core import book, claims, fetch, pages

pytestmark = pytest.mark.slow


def environment(folder: Path) -> dict[str, str]:
    """No mirror, an empty cache, no way out to the network, results of its own."""
    changes = {
        book.RESULTS_VARIABLE: str(folder / "results"),
        fetch.CACHE_VARIABLE: str(folder / "cache"),
        "https_proxy": "http://127.0.0.1:9",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    kept = {k: v for k, v in os.environ.items() if k != fetch.MIRROR_VARIABLE}
    return kept | changes


def command(source: Path, folder: Path, *config: str) -> list[str]:
    return [
        "snakemake",
        f"--snakefile={source / 'Snakefile'}",
        f"--profile={source / 'profiles' / 'local'}",
        f"--directory={folder}",
        "--config",
        f"out={folder}",
        *config,
    ]


def snakemake(
    source: Path, folder: Path, *config: str, timeout: float = 600
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(source, folder, *config),
        capture_output=True,
        text=True,
        env=environment(folder),
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def phantom_book(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("book")
    answer = snakemake(repository / "book", folder, "tier=auto")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


def built_books(phantom_book: Path, repository: Path) -> Iterator[tuple[str, Path]]:
    yield "phantom", phantom_book / "_build" / "html"
    for tier in ("phantom", "released", "volumes"):
        if (repository / "_build" / "html" / f".{tier}").is_file():
            yield tier, repository / "_build" / "html"


def test_without_network_auto_is_a_book_on_phantoms(phantom_book: Path, repository: Path) -> None:
    assert (phantom_book / "_build" / "html" / ".phantom").is_file()
    records = claims.load_records(phantom_book / "results")
    assert {record.data for record in records.values()} == {"phantom"}
    for path in (phantom_book / "results").rglob("claims.json"):
        assert all(row["verdict"] is None for row in json.loads(path.read_text())["claims"])
    board = (phantom_book / "results" / "phantom" / "scoreboard" / "scoreboard.csv").read_text()
    for verdict in claims.VERDICTS:
        assert f",{verdict}," not in board


def test_second_run_has_nothing_to_do(phantom_book: Path, repository: Path) -> None:
    again = snakemake(repository / "book", phantom_book, "tier=phantom")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stderr
    other = phantom_book / "results" / "phantom" / "feature_analysis" / "claims.json"
    before = other.read_text()
    other.write_text(before.replace('"n_trees": 100', '"n_trees": 99'))
    third = snakemake(repository / "book", phantom_book, "tier=phantom")
    assert "Executing feature_analysis" in third.stderr and "Executing cohort" not in third.stderr
    assert '"n_trees": 100' in other.read_text(), "results of another run are not published"


def test_pages_are_clean(phantom_book: Path, repository: Path) -> None:
    names = [*pages.chapters(repository / "book"), *(p.stem for p in repository.glob("book/*.md"))]
    for tier, folder in built_books(phantom_book, repository):
        for name in names:
            page = (folder / f"{name}.html").read_text(encoding="utf-8")
            where = f"{folder / name}.html"
            assert f'data-tier="{tier}"' in page or f"data-tier=&quot;{tier}" in page, where
            plain = html.unescape(re.sub(r"<script.*?</script>|<[^>]+>", "", page, flags=re.S))
            for wrong in ("Traceback", "Warning:", "Error:", str(repository), str(Path.home())):
                assert wrong not in plain, f"{where} shows {wrong}"
            assert "/site-packages/" not in plain and str(folder.parents[1]) not in plain, where
            for target in re.findall(r'(?:href|src)="([^":#?]+)(?:[#?][^"]*)?"', page):
                assert (folder / target).exists(), f"{where} refers to missing {target}"
            for anchor in re.findall(r'href="#([^"]+)"', page):
                assert f'id="{html.unescape(anchor)}"' in page, f"{where}: no target #{anchor}"
            for output in re.findall(r'<div class="output .*?<pre>(.*?)</pre>', page, re.S):
                assert output.count("\n") <= 100, where
            size = (folder / f"{name}.html").stat().st_size
            assert size < 3_000_000, f"{where} has {size:,} bytes"


def test_links_for_readers_point_to_the_sources(phantom_book: Path) -> None:
    page = (phantom_book / "_build" / "html" / "diagnosis.html").read_text()
    project = pages.address().removeprefix("https://github.com/")
    assert (
        f"https://colab.research.google.com/github/{project}/blob/main/book/diagnosis.ipynb" in page
    )


def test_one_failing_chapter_stops_no_other(tmp_path: Path, repository: Path) -> None:
    for name in ("book", "data_manifest", "covidmtl_core"):
        shutil.copytree(repository / name, tmp_path / name)
    for name in ("_config.yml", "requirements.lock"):
        shutil.copy(repository / name, tmp_path)
    toc = tmp_path / "book" / "_toc.yml"
    few = ("cohort", "random_weighted_loss", "scoreboard")
    listed = "".join(f"      - file: {name}\n" for name in few)
    toc.write_text(f"format: jb-book\nroot: intro\nparts:\n  - chapters:\n{listed}")
    engine = tmp_path / "book" / "Snakefile"
    upstream = re.compile(r'"scoreboard": \[.*\]')
    engine.write_text(upstream.sub('"scoreboard": ["cohort"]', engine.read_text()))
    path = tmp_path / "book" / "cohort.ipynb"
    notebook = json.loads(path.read_text())
    source = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][3]
    source["source"] = ["raise RuntimeError('broken on purpose')"]
    path.write_text(json.dumps(notebook))
    answer = snakemake(tmp_path / "book", tmp_path, "tier=phantom")
    assert answer.returncode != 0
    results, runs = tmp_path / "results" / "phantom", tmp_path / "_runs" / "phantom"
    assert (results / "random_weighted_loss" / "claims.json").is_file()
    assert "broken on purpose" in (runs / "cohort.ipynb").read_text()
    said = answer.stdout + answer.stderr
    assert "cohort failed (RuntimeError: broken on purpose): see" in said
    assert str(runs / "cohort.ipynb") in said
    assert "scoreboard was not run" in said


def test_a_folder_named_like_a_command_runs_nothing(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "a b; touch ran $(touch ran) `touch ran` & c"
    folder.mkdir()
    answer = snakemake(repository / "book", folder, "tier=phantom", "chapter=cohort")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (folder / "_build" / "html" / "cohort.html").is_file()
    assert not list(tmp_path.rglob("ran")) and not Path("ran").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("chapter=daignosis", "diagnosis"),
        ("tier=relaesed", "phantom, released, volumes"),
        ("tier=released", "COVIDMTL_DATA_MIRROR"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, repository, config: str, message: str) -> None:  # type: ignore[no-untyped-def]
    answer = snakemake(repository / "book", tmp_path, config, timeout=60)
    assert answer.returncode != 0 and message in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr


def test_a_second_run_waits_its_turn_and_a_killed_one_leaves_no_lock(
    tmp_path: Path, repository: Path
) -> None:
    wanted = (repository / "book", tmp_path, "tier=phantom", "chapter=cohort")
    first = subprocess.Popen(
        command(*wanted),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / ".snakemake" / "locks").glob("*")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        second = snakemake(*wanted)
        assert second.returncode != 0 and "Another run" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    again = snakemake(*wanted)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "results" / "phantom" / "cohort" / "claims.json").is_file()


def test_papermill_alone_runs_from_any_folder(tmp_path: Path, repository: Path) -> None:
    papermill = [
        "papermill",
        str(repository / "book" / "cohort.ipynb"),
        "out.ipynb",
        "-k",
        "python3",
    ]
    elsewhere = tmp_path / "some where"
    elsewhere.mkdir()
    subprocess.run(papermill, cwd=elsewhere, env=environment(tmp_path), check=True, timeout=300)
    assert (elsewhere / "out.ipynb").is_file()
    assert (tmp_path / "results" / "phantom" / "cohort" / "claims.json").is_file()
