"""Run by like_colab.sh in its root: a notebook executed, held to what is promised on Colab."""

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WORK = Path("/work")
ON_COLAB = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')"
"""Colab's kernel has that module loaded; this one is made to."""


def installed() -> dict[str, str]:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    return {package["name"]: package["version"] for package in json.loads(listed.stdout)}


def execute(chapter: str) -> dict[str, float | str]:
    """Seconds of the first cell, to the first output that is not text alone, and of all."""
    folder = WORK / chapter
    notebook = nbformat.read(folder / f"{chapter}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    cells = list(notebook.cells)
    before, client = installed(), NotebookClient(notebook, timeout=1200, resources=resources)
    figures: dict[str, float | str] = {}
    with client.setup_kernel():
        client.execute_cell(nbformat.v4.new_code_cell(ON_COLAB), 0)
        start = time.perf_counter()
        for index, cell in enumerate(cells):
            if cell.cell_type != "code":
                continue
            client.execute_cell(cell, index)
            now = round(time.perf_counter() - start, 1)
            figures.setdefault("first cell", now)
            kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
            if kinds & {"image/png", "text/html"} and index > 4:
                figures.setdefault("first figure or table", now)
        figures["all"] = now
    after = installed()
    changed = {
        name: (version, after.get(name))
        for name, version in before.items()
        if after.get(name) != version
    }
    if changed:
        raise SystemExit(f"{chapter}: the first cell changed {changed}")
    if figures["first cell"] >= 60 or figures["first figure or table"] >= 180:
        raise SystemExit(f"{chapter}: too slow: {figures}")
    figures["installed"] = ", ".join(sorted(set(after) - set(before)))
    return figures


def main(chapter: str) -> None:
    kept = WORK / "colab.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    found[chapter] = execute(chapter)
    print(chapter, found[chapter], flush=True)
    kept.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
