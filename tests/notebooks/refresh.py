"""Execute the chapters at their defaults and keep only the outputs that tests compare.

Run by `make notebooks` after a chapter was edited: it also writes the first code cell anew, and
removes every other output, execution counts and editor metadata, so that a chapter's diff shows
what its author changed.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from covidmtl_core import pages

BOOK = Path(__file__).resolve().parents[2] / "book"
CELL_METADATA = {"tags", "mystnb", "jupyter", "cellView"}


def clean(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in CELL_METADATA}
        if cell.cell_type == "code":
            checked = "nbval-check-output" in cell.metadata.get("tags", ())
            cell.execution_count = 1 if checked else None  # nbval compares no cell without one
            cell.outputs = cell.outputs if checked else []
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = 1


def main() -> None:
    with tempfile.TemporaryDirectory() as results:
        os.environ["COVIDMTL_RESULTS"] = results
        for path in sorted(BOOK.glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            notebook.cells[1].source = pages.set_up_cell()
            NotebookClient(notebook, kernel_name="python3").execute(cwd=str(BOOK))
            clean(notebook)
            nbformat.write(notebook, path)
            print(f"{path.name} refreshed")


if __name__ == "__main__":
    main()
