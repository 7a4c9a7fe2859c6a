"""Rules that every chapter keeps, read from its source."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

from covidmtl_core import book, claims, pages

BOOK = Path(__file__).resolve().parents[2] / "book"
CHAPTERS = pages.chapters(BOOK)
PAGES = sorted([*BOOK.glob("*.md"), *BOOK.glob("*.ipynb")])
QUOTED = re.compile(r"([\d.,]+(?:e-\d+)?)[ %]*<!-- (paper|released|recorded):([\w.,/ ]+?) -->")


def cells(chapter: str) -> list[dict]:
    return json.loads((BOOK / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]


def tagged(chapter: str, tag: str) -> list[dict]:
    return [cell for cell in cells(chapter) if tag in cell["metadata"].get("tags", ())]


def text_of(page: Path) -> str:
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    sources = (c["source"] for c in cells(page.stem) if c["cell_type"] == "markdown")
    return "\n".join("".join(source) for source in sources)


def test_every_notebook_is_in_the_table_of_contents() -> None:
    assert sorted(CHAPTERS) == sorted(path.stem for path in BOOK.glob("*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_has_its_fixed_parts(chapter: str) -> None:
    first, *_ = everything = cells(chapter)
    assert "".join(first["source"]).startswith("# ")
    assert re.search(r"\*\*Question.*\*\*Time", "".join(first["source"]), re.S)
    assert len(tagged(chapter, "parameters")) == 1
    sources = ["".join(cell["source"]) for cell in everything]
    assert "google.colab" in sources[1]
    assert "chapter.finish()" in sources[-1]
    for row in ("Question", "You learn", "Before", "Inputs", "Outputs", "Time"):
        assert f"| **{row}** |" in "".join(first["source"]), row
    prose = text_of(BOOK / f"{chapter}.ipynb")
    for heading in ("What we learned", "Check yourself", "Exercises"):
        assert f"## {heading}\n" in prose, heading


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_exercise_has_a_solution_that_is_executed(chapter: str) -> None:
    prose = text_of(BOOK / f"{chapter}.ipynb").partition("## Exercises\n")[2]
    asked = re.findall(r"^\*\*(\d)\.\*\* \S", prose, re.M)
    assert 3 <= len(asked) <= 6
    solutions = tagged(chapter, "solution")
    for number, cell in zip(asked, solutions, strict=True):
        assert "".join(cell["source"]).startswith(f"# @title Solution {number}\n")
        assert "hide-cell" in cell["metadata"]["tags"]
        assert cell["metadata"]["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
        assert cell["metadata"]["cellView"] == "form"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_question_has_one_right_answer(chapter: str) -> None:
    prose = text_of(BOOK / f"{chapter}.ipynb")
    section = prose.partition("## Check yourself\n")[2].partition("\n## ")[0]
    questions = re.split(r"^\*\*(.+)\*\*$", section, flags=re.M)[1:]
    assert len(questions) // 2 >= 2
    for question, answers in zip(questions[::2], questions[1::2], strict=True):
        feedback = re.findall(r"</summary>\n\n(.+)\n\n</details>", answers)
        assert len(feedback) >= 2, question
        assert sum(text.startswith("Right") for text in feedback) == 1, question


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_parameters_default_to_the_phantom_tier(chapter: str) -> None:
    (cell,) = tagged(chapter, "parameters")
    values, source = {}, "".join(cell["source"])
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign), "parameters are plain assignments"
        values[statement.targets[0].id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
    assert values["tier"] == "phantom"
    assert all(line.count("#") == 1 for line in source.splitlines()), "each is explained"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_sources_hold_no_outputs_but_checked_ones(chapter: str) -> None:
    for cell in cells(chapter):
        if cell["cell_type"] == "code":
            checked = "nbval-check-output" in cell["metadata"].get("tags", ())
            assert bool(cell["outputs"]) == checked
            assert cell["execution_count"] == (1 if checked else None)
    assert len({cell["id"] for cell in cells(chapter)}) == len(cells(chapter))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_figures_have_captions_and_alternative_text(chapter: str) -> None:
    for cell in cells(chapter):
        if "plt.show()" in "".join(cell["source"]):
            shown = cell["metadata"]["mystnb"]
            assert shown["figure"]["caption"].endswith(".") and shown["image"]["alt"]


def test_numbers_in_the_text_are_those_of_the_claims_file() -> None:
    known, quoted = claims.load_claims(), 0
    for page in PAGES:
        for number, source, claim_id in QUOTED.findall(text_of(page)):
            if source == "paper":
                quoted += 1
                printed = known[claim_id]
                value = float(number.replace(",", ""))
                assert value == printed.value, f"{page.name}: {number} is not {printed.printed}"
            if source == "recorded":
                name, _, key = claim_id.partition("/")
                figure = (book.recorded(name) or {})[key]
                assert float(number.replace(",", "")) == figure, f"{page.name}: {key} is {figure}"
        marks = len(re.findall(r"<!-- (?:paper|released|recorded):", text_of(page)))
        assert marks == len(QUOTED.findall(text_of(page))), f"{page.name}: a mark without number"
    assert quoted >= 15


@pytest.fixture
def records() -> dict[str, claims.Record]:
    results = BOOK.parent / "results" / "released"
    if not results.is_dir() and not os.environ.get("COVIDMTL_REQUIRE_DATA"):
        pytest.skip("no released results: run `make book TIER=released` first")
    return claims.load_records(results)


def test_all_that_released_data_can_settle_has_a_value(records: dict[str, claims.Record]) -> None:
    open_ = [c.id for c in claims.load_claims().values() if set(c.needs) == {"released"}]
    assert len(open_) >= 40 and set(open_) <= set(records)


def test_numbers_in_the_text_are_those_measured(records: dict[str, claims.Record]) -> None:
    quoted = 0
    for page in PAGES:
        for number, source, claim_id in QUOTED.findall(text_of(page)):
            if source == "released":
                quoted += 1
                decimals = len(number.partition(".")[2])
                measured = f"{records[claim_id].value:.{decimals}f}"
                assert number == measured, f"{page.name}: {number} is not {measured}"
    assert quoted >= 5
