"""What Sphinx adds to a page, on a small book of a chapter and a glossary."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from covidmtl_core import book, claims, pages
from covidmtl_core.claims import Record
from covidmtl_core.errors import ClaimError

GLOSSARY = """# Glossary

```{glossary}
CT
  Computed tomography. More.

Batch norm
  A layer.
```
"""


def code(source: str, output: str, name: str = "") -> dict:
    shown = {"figure": {"caption": f"About {name}.", "name": name}} if name else {}
    return {
        "cell_type": "code",
        "execution_count": 1,
        "id": name or "cell",
        "metadata": {"mystnb": shown} if shown else {},
        "outputs": [{"output_type": "display_data", "data": {"text/html": output}, "metadata": {}}],
        "source": source,
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("book")
    prose = (
        "# One\n\nA CT, ct, and CTs; Batch norms. The [figure](#fig-a), the [table](#tab-b), and"
        " the [words](#fig-a).\n\n```\nBatch norm\n```\n\n$$\na = b \\label{eq-a}\n$$\n\n"
        "By [equation](#eq-a), not by a [figure](#fig-none)."
    )
    end = '<small id="provenance" data-commit="abc1234-dirty">Provenance.</small>'
    cells = [
        {"cell_type": "markdown", "id": "m", "metadata": {}, "source": prose},
        code("start()", book.banner_html("released")),
        code("draw()", "<p>drawn</p>", "fig-a"),
        code("count()", "<p>counted</p>", "tab-b"),
        code("draw()", "", "fig-none") | {"outputs": []},
        code("finish()", end),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4}
    (folder / "one.ipynb").write_text(json.dumps(notebook | {"nbformat_minor": 5}))
    (folder / "glossary.md").write_text(GLOSSARY)
    (folder / "index.md").write_text("# All\n\n```{toctree}\n:numbered: 1\none\nglossary\n```\n")
    (folder / "conf.py").write_text(
        "extensions = ['myst_nb', 'covidmtl_core.sphinx_extension']\n"
        "myst_enable_extensions = ['dollarmath']\n"
        "nb_execution_mode = 'off'\nnumfig = True\nnumfig_secnum_depth = 1\n"
    )
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(folder), str(folder / "html")]
    subprocess.run(command, check=True, timeout=120)
    return (folder / "html" / "one.html").read_text(encoding="utf-8")


def test_figures_and_tables_are_numbered_apart(built: str) -> None:
    assert re.search(r"Fig\. 1\.1 .*?About fig-a\.", built, re.S)
    assert re.search(r"Table 1\.1 .*?About tab-b\.", built, re.S)


def test_links_called_figure_or_table_show_the_number(built: str) -> None:
    link = r'<a class="[^"]*" href="#{}">(?:<span[^>]*>)*{}(?:</span>)*</a>'
    assert re.search(link.format("fig-a", r"Fig\. 1\.1"), built)
    assert re.search(link.format("tab-b", r"Table 1\.1"), built)
    assert re.search(link.format("fig-a", "words"), built)


def test_equations_are_numbered_and_linked(built: str) -> None:
    assert re.search(r'id="eq-a">\s*<span class="eqno">\(1\.1\)', built)
    assert re.search(r'href="#eq-a">(?:<span[^>]*>)*Eq\. \(1\.1\)', built)
    assert r"\label" not in built


def test_a_figure_that_was_not_drawn_is_not_linked(built: str) -> None:
    assert "not by a figure." in built


def test_each_says_its_cell_commit_and_data(built: str) -> None:
    origins = re.findall(r'<p class="origin">(.*?)</p>', built, re.S)
    assert len(origins) == 2
    for origin, cell in zip(origins, (2, 3), strict=True):
        assert f'href="#cell-{cell}"' in origin and f'id="cell-{cell}"' in built
        assert f'{pages.address()}/blob/abc1234/book/one.ipynb"' in origin
        assert 'href="#provenance">released data</a>' in origin


def test_terms_are_linked_once_with_their_meaning(built: str) -> None:
    links = re.findall(r'<a class="term[^"]*" href="(.*?)" title="(.*?)">(.*?)</a>', built)
    assert links == [
        ("glossary.html#term-CT", "Computed tomography.", "CT"),
        ("glossary.html#term-Batch-norm", "A layer.", "Batch norms"),
    ]


def test_the_zip_holds_every_page_but_itself(tmp_path: Path) -> None:
    html = tmp_path / "html"
    html.mkdir()
    (html / "intro.html").write_text("page")
    for _ in range(2):
        packed = pages.pack(html)
        assert packed == html / pages.ARCHIVE
        with zipfile.ZipFile(packed) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == {"html/intro.html"}


def test_the_assembled_book_needs_no_network(repository: Path, tmp_path: Path) -> None:
    target = pages.assemble(repository / "book", tmp_path, "phantom")
    config = yaml.safe_load((target / "_config.yml").read_text())
    assert config["repository"]["url"] == pages.address()
    (extra,) = config["sphinx"]["config"]["html_extra_path"]
    script = target / extra / "_static" / config["sphinx"]["config"]["mathjax_path"]
    (target / extra / "_static").mkdir()  # where the page's address begins
    assert script.stat().st_size > 500_000
    assert len(list(script.parent.rglob("*.woff"))) > 10
    assert (target / extra / "vendor" / "plotly.min.js").is_file()


def contribution(folder: Path, data: str, commit: str) -> Path:
    record = Record("table3.covidmtl.ct.accuracy", data, 90.1, low=89.0, high=91.0, seeds=10)
    made = {"commit": commit, "device": "a card", "date": "2026-11-28"}
    claims.save_records(folder / "someone" / "diagnosis" / "claims.json", [record], made)
    return folder


def test_contributions_are_listed_with_their_verdicts(tmp_path: Path) -> None:
    assert "Nobody yet" in pages.contributed(tmp_path / "none")
    table = pages.contributed(contribution(tmp_path, "volumes", "abc1234"))
    assert "| someone | 1 | agrees 1 | a card | 2026-11-28 |" in table


@pytest.mark.parametrize(
    ("data", "commit", "message"),
    [
        ("phantom", "abc1234", "not measured on CT volumes"),
        ("volumes", "abc1234-dirty", "not made at a commit"),
    ],
)
def test_contributions_are_refused(tmp_path: Path, data: str, commit: str, message: str) -> None:
    with pytest.raises(ClaimError, match=message):
        pages.contributed(contribution(tmp_path, data, commit))


def test_what_was_contributed_is_whole(repository: Path) -> None:
    assert pages.contributed(repository / "book" / "contributed")
