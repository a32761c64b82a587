"""The command line, kept thin: ``batchtrim compare``, ``report`` and the rest; options come from ``lab/options.py``."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from batchtrim import __version__
from batchtrim.lab import options
from batchtrim.lab.execute import bounded_wait
from batchtrim.lab.files import CannotWrite, as_written, shown
from batchtrim.lab.run.settings import overridden
from batchtrim.lab.terminal import FAILED, INTERRUPTED, guard, open_closed, print_plainly

app = typer.Typer(
    name="batchtrim",
    help="Train the same network with mini-batch trimming and other methods, and test whether it helps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 130, "help_option_names": ["-h", "--help"]},
)

# Each command's own defaults, shown in its help.
COMPARE = {"methods": ["full", "trim"], "seeds": 5}
SWEEP = {
    "methods": ["full", "trim", "random"],
    "seeds": 5,
    "schedule": ["linear", "cosine", "step"],
    "keep_end": [0.1, 0.2, 0.5],
}
TRAIN = {"method": "trim", "seed": 0}


def _command(name: str, *tables: options.Table) -> Callable[[Callable[[dict[str, Any]], None]], Any]:
    """Register a function of one dict as a command whose options are those of ``tables``."""

    def register(function: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            guard(lambda: function(given), given.get("debug", False))

        parameters = {key: value for table in tables for key, value in table.items()}
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                for key, (kind, default) in parameters.items()
            ]
        )
        command.__annotations__ = {key: kind for key, (kind, _) in parameters.items()}
        command.__doc__ = function.__doc__
        return app.command(name, cls=options.Once)(command)

    return register


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchtrim {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="show the version and exit", callback=_tell_version, is_eager=True)
    ] = False,
) -> None: ...


@_command("compare", options.settings_table(COMPARE, options.MANY), options.PLACE, options.SCALE, options.TALK)
def compare(given: dict[str, Any]) -> None:
    """Train with several methods on the same data and seeds.

    Run the same command again to continue where it stopped.
    """
    _run_and_report(overridden(COMPARE, options.read_settings(given)), given)


@_command("sweep", options.settings_table(SWEEP, options.MANY), options.PLACE, options.SCALE, options.TALK)
def sweep(given: dict[str, Any]) -> None:
    """Compare keep schedules and final keep fractions, or another grid.

    The default is three schedules by three final keep fractions; a TOML file can define another grid.
    """
    _run_and_report(overridden(SWEEP, options.read_settings(given)), given)


@_command("train", options.settings_table(TRAIN, options.ONE), options.PLACE, options.TALK)
def train(given: dict[str, Any]) -> None:
    """Train once, with checkpoints.

    Run the same command again to continue from the last checkpoint.
    """
    settings = {**TRAIN, **options.read_settings(given)}
    options.check_one_run(settings)
    _run_and_report(settings, given)


DEMO_OUT = options.option(Path | None, "folder for runs.jsonl and the report [runs/demo]")


@_command("demo", {"out": DEMO_OUT, "workers": options.SCALE["workers"]}, options.TALK)
def demo(given: dict[str, Any]) -> None:
    """Compare full and trim on digits, in a minute or two.

    It trains with five seeds. The images come with scikit-learn; nothing is downloaded.
    """
    settings = {"dataset": "digits", "model": "cnn", "methods": ["full", "trim"], "seeds": 5, "epochs": 30}
    _run_and_report(settings, {**given, "out": given["out"] or Path("runs/demo")})


@_command("report", options.REPORT)
def report_command(given: dict[str, Any]) -> None:
    """Write the report on a folder of runs or a CSV file.

    It writes report.html (self-contained), report.md and report.csv. For FILE.csv they go to the folder FILE.
    """
    baseline, figures = given["baseline"], given["figures"]
    options.check_targets(out=given["out"], figures=figures)
    way = options.direction(given["higher_is_better"], given["lower_is_better"])
    rows, place = _rows_of(given["folder"], given["csv"], given["metric"], way)
    from batchtrim.lab.analyse import comparison

    with as_written("the records"):
        comparison.check_baseline(rows, baseline)
    _report(rows, None if given["as_json"] else given["out"] or place, baseline, given["as_json"])
    if figures is not None:
        from batchtrim.lab.present import figures as drawing

        paths = drawing.save(comparison.summarize(rows, baseline), figures)
        typer.echo(f"figures: {len(paths)} files in {shown(figures)}", err=given["as_json"])


@_command("claims", options.CLAIMS)
def claims_command(given: dict[str, Any]) -> None:
    """Judge the claims written down beside recorded runs.

    A claim in claims.toml (that one method errs less than another, say) is supported, not supported or not decidable.
    """
    from batchtrim.lab.analyse import claims
    from batchtrim.lab.present import readme_table, results

    folder, out, table = given["folder"], given["out"], given["table"]
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of records, got {folder}, which is not a folder.")
    folders = sorted(path.parent for path in folder.glob("**/claims.toml") if (path.parent / "runs.jsonl").exists())
    if not folders:
        raise FileNotFoundError(f"expected claims.toml beside runs.jsonl in or under {folder}, got none.")
    with as_written("the records"):
        found = [claims.read(each) for each in folders]
        if table is not None:
            readme_table.write(found, table)
            typer.echo(f"table: {shown(table)}")
        if out is not None:
            results.write(found, out)
            typer.echo(f"results: {shown(out)}")
        if out is None and table is None:
            typer.echo(results.page(found), nl=False)


@_command("show", options.SHOW)
def show_command(given: dict[str, Any]) -> None:
    """Write a page of the samples that stayed hard.

    It shows images, a map, confusions, and classes over time. The run must have been made with --keep-log. The page is
    self-contained and opens offline.
    """
    from batchtrim.lab.present import gallery

    options.check_data_dir(given["data_dir"])
    chosen = {name: given[name] for name in ("key", "method", "seed", "data_dir")}
    with as_written("the records and the keep log"):
        page = gallery.build(given["run"], given["out"], **chosen)
    typer.echo(f"gallery: {shown(page)}")


@_command("methods", options.METHODS_LISTED)
def methods_command(given: dict[str, Any]) -> None:
    """List the methods and their parameters."""
    from batchtrim.lab.methods.table import METHODS

    if given["as_json"]:
        typer.echo(json.dumps({row.name: row.described() for row in METHODS.values()}, indent=1))
        return
    for row in METHODS.values():
        typer.echo(f"{row.name}: {row.summary} ({row.source})")
        for name, param in row.params.items():
            typer.echo(f"    {row.name}.{name}={param.default}  {param.help}")


def _rows_of(
    folder: Path | None, csv: Path | None, metric: str | None, higher_is_better: bool | None
) -> tuple[list[dict[str, Any]], Path]:
    """Return the runs of a folder or of a table, and where their report goes."""
    from batchtrim.lab import records
    from batchtrim.lab.analyse import csv_table

    if csv is not None and folder is None:
        return csv_table.read_csv(csv, metric, higher_is_better), csv.with_suffix("")
    if folder is None or csv is not None:
        raise ValueError(
            f"expected a folder with runs.jsonl or --csv FILE, got {'neither' if csv is None else 'both'}."
        )
    if metric is not None or higher_is_better is not None:
        raise ValueError("expected --metric beside --csv, got it beside a folder, whose runs name their metric.")
    folder = folder.parent if folder.is_file() and folder.name == "runs.jsonl" else folder
    rows = records.read_results(folder)
    if torn := records.torn(folder):
        typer.echo(
            f"note: {torn} is a partial run and is left out. The machine may have crashed while writing it.", err=True
        )
    return rows, folder


def main() -> None:
    """Run the ``batchtrim`` command."""
    open_closed()
    print_plainly()
    bounded_wait.call_and_leave(app)


def _run_and_report(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Do the runs that are not done yet, then print the comparison and write its report."""
    from batchtrim.lab import records

    with contextlib.redirect_stdout(sys.stderr):  # the user's code prints for people, as in a worker
        configs, out, failed, rank = _run(settings, given)
    if rank == 0:
        rows = _in_order(records.read_results(out), configs)
        _report(rows, out, "full", given["as_json"], [config.method for config in configs])
    for row in failed:
        typer.echo(f"failed: {row['config']['method']} seed {row['config']['seed']}: {row.get('error')}", err=True)
    for text in dict.fromkeys(row["traceback"] for row in failed if "traceback" in row):
        typer.echo(text, err=True)
    if failed:
        runs, them = ("1 run", "it") if len(failed) == 1 else (f"{len(failed)} runs", "them")
        typer.echo(f"{runs} failed; repeat the command to retry {them}.", err=True)
        raise typer.Exit(FAILED)


def _in_order(rows: list[dict[str, Any]], configs: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the runs of earlier commands, then those of this one in its order: several workers end in any order."""
    place = {config.key: number for number, config in enumerate(configs)}
    return sorted(rows, key=lambda row: place.get(row["key"], -1))


def _configs(task: str | None, settings: dict[str, Any], given: dict[str, Any]) -> tuple[list[Any], list[str | None]]:
    """Return the runs that a command asks for, of the lab's own loop or of the user's function, and notes on them."""
    from batchtrim.lab.execute import grid, preflight
    from batchtrim.lab.run import loading
    from batchtrim.lab.task.own_code import Code

    if task is not None:
        options.refuse_with_task(given)
        return list(grid.expand_task(Code.in_file(task, "task"), settings)), []
    options.refuse_without_task(settings)
    place = given.get("data_dir")
    expanded = grid.expand(settings)
    configs = loading.with_versions(expanded, place)
    options.check_data_dir(place, {config.dataset for config in configs})
    return configs, [*preflight.copies(expanded, configs)]


def _run(settings: dict[str, Any], given: dict[str, Any]) -> tuple[list[Any], Path, list[dict[str, Any]], int]:
    """Do the runs; return all runs, their folder, the records of those that failed, and this process's rank."""
    from batchtrim.lab import own, records
    from batchtrim.lab.execute import cores, folders, grid, preflight, progress, scheduler
    from batchtrim.lab.run.ranks import Ranks

    settings = dict(settings)
    task = settings.pop("task", None)
    configs, said = _configs(task, settings, given)
    for name, least in (("retries", 0), ("checkpoint_seconds", 0.0)):
        if given.get(name) is not None and not given[name] >= least:  # NaN is not
            raise ValueError(f"expected `{name}` to be at least {least:g}, got {given[name]:g}.")
    ranks = Ranks.from_environment()
    workers, threads = cores.share_cores(len(configs), given.get("workers") if ranks.world == 1 else ranks.local)
    workers = workers if ranks.world == 1 else 1
    configs = cores.with_threads(configs, threads, settings, bool(given.get("ray")))
    most = max(config.threads for config in configs)
    said += [cores.crowded(workers, most)] if not given.get("ray") else []
    said += preflight.warnings_for(settings, configs)
    out = given["out"]
    if out is None:
        base = folders.named_after(configs) if task is None else own.default_out(configs)
        out, note = folders.free_folder(base, grid.cells(configs))
        said.append(note)
    names = ("checkpoint_seconds", "tensorboard", "keep_log")
    typed = {name: given[name] for name in names if given.get(name) is not None}
    shared = scheduler.SharedOptions(out, given.get("data_dir"), **typed)
    try:
        with progress.Quiet() if given["quiet"] or ranks.rank > 0 else progress.Live() as watcher:
            for text in filter(None, said):
                watcher.note(text)
            failed = scheduler.run_all(
                configs, shared, watcher, workers=workers, ray=given.get("ray"), retries=given.get("retries", 2),
                isolated=task is not None,
            )  # fmt: skip
    except KeyboardInterrupt:
        done = len(records.Records(out, make=False).rows())
        typer.echo(f"\nstopped; {done} runs are recorded in {shown(out)}. Repeat the command to continue.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    return configs, out, failed, ranks.rank


def _report(
    rows: list[dict[str, Any]], out: Path | None, baseline: str, as_json: bool, methods: Iterable[str] | None = None
) -> None:
    """Print the table, or the numbers as JSON, and write the report if there is a folder for it."""
    from batchtrim.lab.analyse import comparison
    from batchtrim.lab.present import report, tables

    there = [row["config"]["method"] for row in rows]
    if baseline == "full" and "full" not in there:
        baseline = next(iter([*(methods or ()), *there]), baseline)
    with as_written("the records"):
        summary = comparison.summarize(rows, baseline=baseline)
        try:
            page = out and report.write_report(rows, out, baseline)
        except CannotWrite:  # the numbers are printed anyway
            tables.print_numbers(summary, as_json)
            raise
    tables.print_numbers(summary, as_json)
    if not as_json:
        typer.echo(f"report: {shown(page)}")


if __name__ == "__main__":
    main()
