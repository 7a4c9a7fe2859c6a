"""What Sphinx adds to the book's pages, so that the notebooks themselves stay plain Markdown.

Outputs whose name begins with `tab-` are numbered as tables, formulas with a TeX label as
equations. Figures and tables say which cell of which commit drew them, from which data. A link
`[figure](#fig-name)` shows the number. A glossary term is linked where a page uses it first.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.writers.html5 import HTML5Translator

from covidmtl_core.pages import address

GLOSSARY = "glossary"
_BANNER = re.compile(r'class="data-banner".*?<b>(.*?)\.</b>', re.S)
_COMMIT = re.compile(r'id="provenance" data-commit="(.*?)"')
_LABEL = re.compile(r"\\label\{(eq-[\w-]+)\}")
_NUMBERED = {"figure": "figure", "table": "table", "equation": "displaymath"}
_NOT_PROSE = (nodes.title, nodes.reference, nodes.literal, nodes.math, nodes.table, nodes.raw)


class DataTable(nodes.figure):
    """A numbered table that a cell has put out."""


class Numbered(SphinxTransform):
    """Make tables of figures named so, say below both where they come from; label equations."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        commit = next(
            (
                found[1]
                for raw in self.document.findall(nodes.raw)
                if (found := _COMMIT.search(raw.astext()))
            ),
            None,
        )
        for cell in self.document.findall(nodes.container):
            if cell.get("nb_element") == "cell_code":
                cell["ids"].append(f"cell-{cell['cell_index']}")
        for figure, cell, data in list(_figures(self.document, None, "")):
            if commit:
                figure += self._origin(cell, commit, data)
            if any(name.startswith("tab-") for name in figure["names"]):
                table = DataTable("", *figure.children, **figure.attributes)
                table.source, table.line = figure.source, figure.line
                figure.replace_self(table)
        for formula in self.document.findall(nodes.math_block):
            if label := _LABEL.search(formula.astext()):
                text = _LABEL.sub("", formula.astext())
                formula.children = [nodes.Text(text)]
                formula.update_basic_atts({"names": [label[1]]})
                formula["label"], formula["number"] = label[1], 1
                self.document.note_explicit_target(formula)
        self._unlink_what_was_not_drawn()

    def _unlink_what_was_not_drawn(self) -> None:
        """Leave the word where a cell's figure or table is not there, as in a page not executed."""
        cells = (
            c["cell_metadata"]
            for c in self.document.findall(nodes.container)
            if c.get("cell_metadata")
        )
        promised = {cell.get("mystnb", {}).get("figure", {}).get("name") for cell in cells}
        for link in list(self.document.findall(nodes.reference)):
            target = link.get("refuri", "#")[1:]
            if link.get("id_link") and target in promised - set(self.document.nameids):
                link.replace_self(link.children)

    def _origin(self, cell: nodes.container, commit: str, data: str) -> nodes.legend:
        page = f"{self.env.docname}.ipynb"
        file = f"{address()}/blob/{commit.removesuffix('-dirty')}/book/{page}"
        where = nodes.paragraph("", "", classes=["origin"])
        links = {
            "cell": f"#cell-{cell['cell_index']}",
            f"{page} at commit {commit}": file,
            data.lower(): "#provenance",
        }
        for text, target in links.items():
            link = nodes.reference("", text, refuri=target, internal=target.startswith("#"))
            where += [nodes.Text(" · "), link] if len(where) else [link]
        return nodes.legend("", where)


def _figures(
    node: nodes.Element, cell: nodes.container | None, data: str
) -> Iterator[tuple[nodes.figure, nodes.container, str]]:
    """Figures in reading order, the cell of each and the banner that holds for it.

    A banner holds to the end of its section.
    """
    for child in node.children:
        if not isinstance(child, nodes.Element):
            continue
        if isinstance(child, nodes.raw):
            data = _banner(child) or data
        if isinstance(child, nodes.container) and child.get("nb_element") == "cell_code":
            cell = child
            for raw in child.findall(nodes.raw):
                data = _banner(raw) or data
        if isinstance(child, nodes.figure) and cell is not None:
            yield child, cell, data
        else:
            yield from _figures(child, cell, data)


def _banner(raw: nodes.raw) -> str:
    found = _BANNER.search(raw.astext())
    return found[1] if found else ""


def name_links(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the number into links to figures, tables and equations that are called just that."""
    numbers = app.env.toc_fignumbers
    for link in doctree.findall(nodes.reference):
        text = link.astext().lower()
        if text not in _NUMBERED:
            continue
        page, _, anchor = link.get("refuri", "").partition("#")
        page, anchor = page.removesuffix(".html") or docname, anchor or link.get("refid", "")
        number = numbers.get(page, {}).get(_NUMBERED[text], {}).get(anchor)
        if number:
            form = app.config.numfig_format.get(text, "Eq. (%s)")
            shown = form % ".".join(map(str, number))
            link.children = [nodes.inline("", shown)]


def link_terms(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Link each term of the glossary where a page uses it first, with its meaning as a hint."""
    meanings = _meanings(app)
    if docname == GLOSSARY or not meanings:
        return
    words = sorted(meanings, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, words))})(?![\w-])", re.I)
    seen: set[str] = set()
    for text in list(doctree.findall(nodes.Text)):
        if not _is_prose(text):
            continue
        parts: list[nodes.Node] = []
        end = 0
        for found in pattern.finditer(str(text)):
            word = found[0] if found[0] in meanings else found[0].lower()
            if word not in meanings or meanings[word][0] in seen:
                continue
            anchor, meaning = meanings[word]
            seen.add(anchor)
            uri = app.builder.get_relative_uri(docname, GLOSSARY)
            link = nodes.reference("", found[0], refuri=f"{uri}#{anchor}", internal=True)
            link["reftitle"], link["classes"] = meaning, ["term"]
            parts += [nodes.Text(str(text)[end : found.start()]), link]
            end = found.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(str(text)[end:])])


def _is_prose(text: nodes.Text) -> bool:
    above, node = [], text.parent
    while node is not None:
        above.append(node)
        node = node.parent
    code = any(node.get("nb_element", "").startswith("cell_code") for node in above)
    paragraph = any(isinstance(node, nodes.paragraph) for node in above)
    return paragraph and not code and not any(isinstance(node, _NOT_PROSE) for node in above)


@cache
def _meanings(app: Sphinx) -> dict[str, tuple[str, str]]:
    """Words and their plurals: anchor and first sentence of the entry."""
    if GLOSSARY not in app.env.all_docs:
        return {}
    known: dict[str, tuple[str, str]] = {}
    for item in app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
        definition = next(item.findall(nodes.definition)).astext().replace("\n", " ")
        sentence = re.split(r"(?<=[.?!]) ", definition)[0]
        for term in item.findall(nodes.term):
            word = term.astext()
            # An abbreviation is one as it is written; other words may begin a sentence or not.
            word = word if word[1:] != word[1:].lower() else word.lower()
            for form in (word, f"{word}s"):
                known[form] = (term["ids"][0], sentence)
    return known


def drop_thebe(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Leave out Thebe, which Jupyter Book adds twice: it would run cells on somebody's server."""
    scripts = context.get("script_files", [])
    context["script_files"] = [
        script for script in scripts if "thebe" not in f"{script} {script.attributes}".lower()
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.add_enumerable_node(
        DataTable, "table", html=(HTML5Translator.visit_figure, HTML5Translator.depart_figure)
    )
    app.add_transform(Numbered)
    app.connect("doctree-resolved", name_links)
    app.connect("doctree-resolved", link_terms)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
