"""The command line: `covidmtl fetch` and `covidmtl claims diff`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from covidmtl_core import claims, fetch
from covidmtl_core.errors import CovidMTLError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The COVID-MTL book's tools.")
claims_app = typer.Typer(no_args_is_help=True, help="The paper's numbers and the book's.")
app.add_typer(claims_app, name="claims")


@app.command("fetch")
def fetch_command(
    ids: Annotated[
        list[str] | None, typer.Argument(help="File ids; none: the released tables.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show the table, fetch nothing.")
    ] = False,
) -> None:
    """Fetch data files by checksum, then show what is there."""
    for file_id in ids or ():
        fetch.find_entry(file_id)
    failed = []
    for file_id in [] if list_only else ids or fetch.released_ids():
        try:
            fetch.fetch(file_id, progressbar=sys.stderr.isatty())
        except CovidMTLError as error:
            failed.append(str(error))
    table = Table("id", "size", "state", "licence", "what it is for", box=box.SIMPLE)
    for entry in fetch.registry().values():
        size = f"{entry.bytes / 1e6:.2f} MB" if entry.bytes else "unknown"
        purpose = " ".join(filter(None, [f"{entry.purpose}.", entry.note]))
        table.add_row(entry.id, size, fetch.state(entry), entry.licence, purpose)
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("id", "size", "state")
    Console().print(table)
    print(f"Cache folder: {fetch.cache_folder()}")
    if failed:
        raise CovidMTLError("\n".join(failed))


@claims_app.command("diff")
def claims_diff(
    a: Annotated[Path, typer.Argument(help="A claims.json, or a folder of results.")],
    b: Annotated[Path, typer.Argument(help="The same of another run.")],
) -> None:
    """Show the claims whose value or verdict differs between two runs; exit status 1 if any."""
    difference = claims.diff(claims.load_records(a), claims.load_records(b))
    if difference.empty:
        print("The two runs recorded the same values.")
        return
    print(difference.to_string(float_format=lambda value: f"{value:.6g}"))
    raise typer.Exit(1)


def main() -> None:
    """Entry point: an error of ours is one message on standard error, never a traceback."""
    try:
        app()
    except CovidMTLError as error:
        print(f"covidmtl: {error}", file=sys.stderr)
        sys.exit(1)
