"""The rendered book: executed chapters and pages put together as a source for Jupyter Book.

What Sphinx then adds to the pages is in `sphinx_extension`.
"""

import json
import shutil
from importlib import metadata, resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from covidmtl_core import claims
from covidmtl_core.book import banner_html, results_folder
from covidmtl_core.errors import ClaimError

ARCHIVE = "covid-mtl-book.zip"

SET_UP = """\
# On Colab, install what is missing, leave the rest alone; elsewhere do nothing.
import sys
from importlib import util
from importlib.metadata import version

if "google.colab" in sys.modules and not util.find_spec("covidmtl_core"):
    import os
    import subprocess

    source = os.environ.get("COVIDMTL_INSTALL") or (
        "git+{address}"
    )
    core = f"covidmtl-core[chapters,volumes] @ {{source}}"
    keep = [f"{{name}}=={{version(name)}}" for name in ("numpy", "torch")]
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, core, *keep], check=True)
"""


def address() -> str:
    """Of the repository, as `pyproject.toml` has it, and no other file."""
    labelled = metadata.metadata("covidmtl-core").get_all("Project-URL") or []
    return dict(text.split(", ", 1) for text in labelled)["Repository"]


def set_up_cell() -> str:
    """The source of every chapter's first code cell."""
    return SET_UP.format(address=address()).rstrip("\n")


def chapters(source: Path) -> list[str]:
    """Names of the notebooks that `_toc.yml` lists, in reading order."""
    toc = yaml.safe_load((source / "_toc.yml").read_text(encoding="utf-8"))
    names = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [name for name in names if (source / f"{name}.ipynb").is_file()]


def assemble(source: Path, runs: Path, tier: str) -> Path:
    """Put executed chapters and pages together as a source that Jupyter Book can render.

    Pages without code get the banner below their title; a chapter that was not executed is
    copied with a note that says so.

    Args:
        source: The folder `book` of the repository.
        runs: The folder with the executed notebooks of one tier.
        tier: Their tier.

    Returns:
        The assembled folder, `book` within `runs`, with a `_config.yml` of its own.
    """
    target = runs / "book"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("_toc.yml", "references.bib"):
        shutil.copy(source / name, target)
    shutil.copytree(source / "_static", target / "_static")
    _copy_scripts(target / "vendor" / "vendor")
    config = yaml.safe_load((source.parent / "_config.yml").read_text(encoding="utf-8"))
    config["repository"]["url"] = address()
    claims.write_atomically(target / "_config.yml", yaml.safe_dump(config, sort_keys=False))
    for page in source.glob("*.md"):
        title, _, body = page.read_text(encoding="utf-8").partition("\n")
        claims.write_atomically(target / page.name, f"{title}\n\n{banner_html(tier)}\n{body}")
    glance = results_folder(tier, "scoreboard") / "at_a_glance.md"
    text = "The scoreboard was not executed in this build."
    if glance.is_file():
        text = glance.read_text(encoding="utf-8")
        shutil.copy(glance.with_suffix(".png"), target)
    claims.write_atomically(target / "at_a_glance.txt", text)
    claims.write_atomically(target / "contributed.txt", contributed(source / "contributed"))
    executions = ["| chapter | executed at (UTC) | seconds |", "|---|---|---|"]
    for name in chapters(source):
        executed = (runs / f"{name}.done").is_file()
        path = (runs if executed else source) / f"{name}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if executed:
            run = notebook["metadata"]["papermill"]
            when = run["start_time"][:16].replace("T", " ")
            executions.append(f"| [{name}]({name}.ipynb) | {when} | {run['duration']:.0f} |")
        else:
            note = "```{warning}\nThis chapter was not executed in this build.\n```"
            cell = {"cell_type": "markdown", "id": "not-executed", "metadata": {}, "source": note}
            notebook["cells"].insert(1, cell)
        _fold_default_parameters(notebook["cells"])
        claims.write_atomically(target / f"{name}.ipynb", json.dumps(notebook))
    claims.write_atomically(target / "executions.txt", "\n".join(executions) + "\n")
    return target


def contributed(folder: Path) -> str:
    """What readers measured on CT volumes of their own, a line a contribution, as Markdown.

    Args:
        folder: With a folder of `claims.json` files for each contribution.

    Raises:
        ClaimError: A file is damaged, its numbers are not of CT volumes, or the code that made it
            was changed after its commit.
    """
    lines, known = [], claims.load_claims()
    for one in sorted(folder.glob("*/")):
        records = claims.load_records(one)
        verdicts = [claims.verdict(known[name], record) for name, record in records.items()]
        counts = ", ".join(
            f"{v} {verdicts.count(v)}" for v in dict.fromkeys(filter(None, verdicts))
        )
        if any(record.data != "volumes" for record in records.values()):
            raise ClaimError(f"{one} has numbers that were not measured on CT volumes.")
        for path in sorted(one.rglob("claims.json")):
            made = json.loads(path.read_text(encoding="utf-8"))["provenance"]
            if made["commit"].endswith("-dirty") or made["commit"] == "unknown":
                raise ClaimError(f"{path} was not made at a commit: run it again at one.")
        lines.append(
            f"| {one.name} | {len(records)} | {counts} | {made['device']} | {made['date']} |"
        )
    if not lines:
        return "Nobody yet: every number of a network on patients' scans is still open.\n"
    head = ["| who | numbers | verdicts | device | date |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n"


def _copy_scripts(target: Path) -> None:
    """plotly and MathJax, so that the pages need no network.

    Not into `_static`: Jupyter Book would load every script there into every page.
    """
    target.mkdir(parents=True)
    with resources.as_file(resources.files("plotly") / "package_data" / "plotly.min.js") as script:
        shutil.copy(script, target)
    packed = resources.files("sphinx-mathjax-offline") / "static" / "mathjax"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    with resources.as_file(packed) as mathjax:
        shutil.copytree(mathjax / fonts, target / "mathjax" / fonts)
        shutil.copy(mathjax / "tex-chtml.js", target / "mathjax")


def pack(html: Path) -> Path:
    """Put the built pages into a zip beside them, for reading without a network."""
    (html / ARCHIVE).unlink(missing_ok=True)
    packed = shutil.make_archive(
        str(html.parent / Path(ARCHIVE).stem), "zip", html.parent, base_dir=html.name
    )
    return Path(shutil.move(packed, html / ARCHIVE))


def _fold_default_parameters(cells: list[dict[str, Any]]) -> None:
    """Where papermill injected parameters, show those and fold the defaults they replace."""
    tags = [cell["metadata"].get("tags", []) for cell in cells]
    for default, injected in pairwise(tags):
        if "injected-parameters" in injected:
            injected += [tag for tag in default if tag == "remove-cell"]
            default.append("hide-input")


def failures(runs: Path, steps: dict[str, list[str]]) -> list[str]:
    """One line for each step that did not finish: what happened and where to look.

    Args:
        runs: The folder with the executed notebooks of one tier, and the logs of all steps.
        steps: Chapters and what comes before them, each after those it builds on; and those.
    """
    lines: list[str] = []
    unfinished: set[str] = set()
    for name, needed in steps.items():
        notebook, log = runs / f"{name}.ipynb", runs / f"{name}.log"
        if unfinished & set(needed):
            lines.append(f"{name} was not run, because something it builds on failed")
        elif not (runs / f"{name}.done").is_file():
            looked_at = [
                str(path) for path in (notebook, log) if path != notebook or path.is_file()
            ]
            lines.append(f"{name} failed{_error_in(notebook, log)}: see {' and '.join(looked_at)}")
        else:
            continue
        unfinished.add(name)
    return lines


def _error_in(notebook: Path, log: Path) -> str:
    """The error that ended an executed notebook, in brackets; else the last line of its log."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = (output for cell in cells for output in cell.get("outputs", ()))
        errors = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
    except (OSError, ValueError, KeyError):
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        errors = [line for line in text.splitlines() if line.strip()]
    return f" ({errors[-1]})" if errors else ""
