"""The command line: `covidmtl fetch`, `check`, `preprocess`, `train`, `predict` and more."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from covidmtl_core import claims, fetch
from covidmtl_core.errors import CovidMTLError, ParameterError

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
    """Fetch data files by checksum, then show what is there of them."""
    for file_id in ids or ():
        fetch.find_entry(file_id)
    failed = []
    for file_id in [] if list_only else ids or fetch.released_ids():
        try:
            fetch.fetch(file_id, progressbar=sys.stderr.isatty())
        except CovidMTLError as error:
            failed.append(str(error))
    table = Table("id", "size", "state", "licence", "what it is for", box=box.SIMPLE)
    shown = [fetch.find_entry(file_id) for file_id in ids or fetch.registry()]
    for entry in shown:
        size = f"{entry.bytes / 1e6:.2f} MB" if entry.bytes else "unknown"
        table.add_row(entry.id, size, fetch.state(entry), entry.licence, entry.purpose)
    for column in table.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("id", "size", "state")
    Console().print(table)
    for entry in shown:
        if entry.note and not ids:
            print(f"{entry.id}: {entry.note}")
    print(f"Cache folder: {fetch.cache_folder()}")
    if failed:
        raise CovidMTLError("\n".join(failed))


@app.command("check")
def check_command(
    folder: Annotated[Path, typer.Argument(help="labels.csv and scans, or 'Patient N.zip' files.")],
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the scans.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Scans read at once.")] = None,
) -> None:
    """List every problem of a folder of scans; exit status 1 if one is an error."""
    from covidmtl_core import data_folder

    problems = data_folder.check(folder, not quick, jobs, progress=True)
    for level, where, problem in problems.itertuples(index=False):
        print(f"{level}: {where}: {problem}")
    errors = int((problems["level"] == "error").sum())
    print(f"{errors} errors, {len(problems) - errors} warnings.")
    if errors:
        raise typer.Exit(1)


@app.command("preprocess")
def preprocess_command(
    source: Annotated[Path, typer.Argument(help="As for `covidmtl check`.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; a second run resumes it.")],
    spacing: Annotated[float, typer.Option(help="Size of the voxels in mm.")] = 1.0,
    method: Annotated[str, typer.Option(help="classical, released or refined.")] = "refined",
    jobs: Annotated[int | None, typer.Option(min=1, help="Scans worked on at once.")] = None,
    part: Annotated[
        str | None, typer.Option(help="K/N: only every Nth scan from the Kth; no tables.")
    ] = None,
) -> None:
    """Make scans ready: lungs, cropped volumes, features, quality pages.

    Several machines share a folder by --part 1/N to N/N; a call without --part then ends the work.
    """
    from covidmtl_core import preprocessing

    which = None
    if part is not None:
        numbers = part.split("/")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ParameterError(f"part is {part!r}; it must be like 2/8.")
        which = (int(numbers[0]), int(numbers[1]))
    scans = preprocessing.preprocess(
        source, target, spacing, method, jobs, progress=True, part=which
    )
    failed = scans.index[scans["state"] == "failed"]
    if part is not None:
        print(f"Part {part}: {len(scans) - len(failed)} scans ready, {len(failed)} failed.")
        return
    print(f"{len(scans) - len(failed)} scans ready in {target}; look at {target / 'quality.html'}.")
    if len(failed):
        print(f"{len(failed)} failed, reasons in scans.csv: {', '.join(map(str, failed))}.")
    if len(failed) == len(scans):
        raise typer.Exit(1)


@app.command("train")
def train_command(
    source: Annotated[Path, typer.Argument(help="Folder that `covidmtl preprocess` made.")],
    target: Annotated[Path, typer.Argument(help="Folder for the run; a second call goes on.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value of recipe.TrainConfig, as often as needed."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; none: what is there.")] = None,
) -> None:
    """Train on the patients of split `train`, then predict and measure those of `test`.

    On several cards: torchrun --nproc-per-node 2 -m covidmtl_core.cli train SOURCE TARGET
    """
    from covidmtl_core import recipe, runs

    runs.train(source, target, recipe.TrainConfig.from_texts(settings or []), device)


@app.command("experiment")
def experiment_command(
    name: Annotated[str, typer.Argument(help="Of the book's experiments: covid_mtl, transfer …")],
    source: Annotated[Path, typer.Argument(help="Folder that `covidmtl preprocess` made.")],
    seed: Annotated[int, typer.Option(help="Training seed; the authors' is 11.")] = 11,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value of recipe.TrainConfig, as often as needed."),
    ] = None,
    classical: Annotated[
        Path | None, typer.Option(help="The same patients, made with --method classical.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; none: what is there.")] = None,
) -> None:
    """Train one of the book's networks ahead of its chapters, which read it among the results."""
    from covidmtl_core import book, experiments, recipe

    values = recipe.TrainConfig.values_from(settings or [])
    epochs = book.SIZES["n_epochs"]["volumes"]
    study = experiments.study("volumes", 0, epochs, source, classical, values, device)
    trained = study.train(name, seed)
    print(f"{name}, seed {seed}: {trained.folder}")


@app.command("predict")
def predict_command(
    source: Annotated[
        Path, typer.Argument(help="One scan, or a folder that `covidmtl preprocess` made.")
    ],
    target: Annotated[
        Path, typer.Argument(help="Folder to write for one scan; CSV to write for many.")
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="last.pt or best.pt of a training; a folder needs one.")
    ] = None,
    lungs: Annotated[
        Path | None, typer.Option(help="Mask of the scan's lungs, if it shall not be found.")
    ] = None,
    spacing: Annotated[
        float | None, typer.Option(help="Voxels in mm to measure on; none: the table's.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="classical, released or refined; none: the table's.")
    ] = None,
    tier: Annotated[
        str, typer.Option(help="Table that features are compared with: released or phantom.")
    ] = "released",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; none: what is there.")] = None,
) -> None:
    """Say what models make of a scan of yours, or a network of many. This is no medical device.

    Of one scan: its lungs, its features among those of the paper's patients, the probabilities of
    models of those features and, with --checkpoint, of a network.
    """
    if (source / "settings.json").is_file():
        if checkpoint is None:
            raise ParameterError("A folder of scans needs --checkpoint; one scan does not.")
        from covidmtl_core import runs

        predicted = runs.predict(checkpoint, source, device)
        claims.write_atomically(target, predicted.to_csv(lineterminator="\n"))
        print(f"{len(predicted)} patients predicted: {target}")
        return
    from covidmtl_core import own_scan

    for line in own_scan.write_report(
        source, target, lungs, checkpoint, spacing, method, tier, device
    ):
        print(line)


@app.command("grid")
def grid_command(
    patients: Annotated[int, typer.Option(help="Phantoms to train and test on.")] = 120,
    epochs: Annotated[int, typer.Option(help="Epochs of a training.")] = 16,
    mm: Annotated[float, typer.Option(help="Voxel size.")] = 6.0,
    seeds: Annotated[int, typer.Option(help="Seeds of each experiment, from 0.")] = 3,
    minutes: Annotated[float, typer.Option(help="No training begins later.")] = float("inf"),
    jobs: Annotated[int, typer.Option(help="Trainings at once, a thread each.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="An experiment, as often as needed; none: all.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; none: what is there.")] = None,
) -> None:
    """Train the book's whole grid of experiments on phantoms; the book shows it as recorded.

    Trainings are kept among the results, so that a stopped grid goes on.
    """
    import torch

    from covidmtl_core import book, experiments

    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = book.results_root() / "grid"
    study = experiments.phantom_study(patients, epochs, folder, mm, target)
    names = only or list(experiments.CATALOGUE)
    found = experiments.grid(study, names, range(seeds), minutes, jobs)
    print(f"Recorded: {experiments.record(found, study, mm)}")


@app.command("doctor")
def doctor_command() -> None:
    """Say what this machine can train, after a short step of COVID-MTL."""
    from covidmtl_core import runs

    for line in runs.doctor():
        print(line, flush=True)


@app.command("verify")
def verify_command(
    results: Annotated[
        Path | None, typer.Argument(help="A folder of results; none: where chapters put them.")
    ] = None,
) -> None:
    """Say which chapters' results are damaged, or stale: code, packages or data changed since."""
    from covidmtl_core import book, verification

    found = verification.verify(results or book.results_root())
    for row in found.itertuples():
        print(f"{row.results}: {row.state}" + f" ({row.reasons})" * bool(row.reasons))
    if (found["state"] != verification.CURRENT).any():
        raise typer.Exit(1)


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


if __name__ == "__main__":
    main()
