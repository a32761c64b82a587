"""Compare methods with your own training function, or from another program's results.

These are the Python forms of ``batchtrim compare --task`` and ``batchtrim report --csv``::

    def train(run):
        ...                                   # any loop, on any data, drawing from run.seed
        loss = run.trim(losses)               # was: losses.mean()
        ...
        run.trim.step()                       # once an epoch
        return {"error": test_error}

    batchtrim.lab.compare(train, methods=["full", "trim", "random"], seeds=5)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchtrim._checks import check_choice, check_count, check_flag, describe, plain
from batchtrim.lab import records
from batchtrim.lab.analyse import comparison, csv_table
from batchtrim.lab.analyse.comparison import Summary
from batchtrim.lab.execute import cores, grid, local, preflight, progress, scheduler
from batchtrim.lab.metric import Metric
from batchtrim.lab.present import report, tables
from batchtrim.lab.present.wording import headline
from batchtrim.lab.run.perform import check_task, perform
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.run.task_run import Run, TaskMistake
from batchtrim.lab.task.own_code import Code, YourCodeFailed

__all__ = ["Run", "compare", "default_out", "headline", "run_once", "summarize"]


def compare(
    train: Callable[[Run], Mapping[str, Any]] | str,
    methods: Sequence[str] | str = ("full", "trim"),
    seeds: int | Sequence[int] = 5,
    *,
    out: str | Path | None = None,
    workers: int = 1,
    ray: str | None = None,
    retries: int = 2,
    tensorboard: bool = False,
    quiet: bool = False,
    baseline: str = "full",
    **settings: Any,
) -> Summary:
    """Run a training function with each method and seed, record every run, and compare the methods seed by seed.

    The same call continues where it stopped: runs recorded in ``out`` are not repeated.

    Args:
        train: called with a :class:`batchtrim.lab.Run`; returns a mapping that contains the metric. Or "FILE.py:NAME".
        methods: names from ``batchtrim methods`` that a trimmer can drive.
        seeds: how many, or which.
        out: folder for records and report; by default one under ``runs`` named after the function.
        workers: processes; 1 uses this one. A notebook's function is sent to others by value. In a script with
            several workers, call this under ``if __name__ == "__main__":``.
        ray: address of a Ray cluster, or "auto".
        retries: how often a run whose worker died is repeated.
        tensorboard: also write the values of ``run.log`` as TensorBoard events.
        quiet: no progress, and no table.
        baseline: the method the others are compared with.
        settings: of the runs: ``epochs``, ``metric``, ``higher_is_better``, ``keep_start``, ``keep_end``, ``schedule``,
            ``params`` (of methods, by method and name), ``engine``, ``device``, ``threads``; a list is an axis.

    Returns:
        The comparison as data; ``report.html``, ``report.md`` and ``report.csv`` are in ``out``.

    Raises:
        TaskMistake: the function returns no number, or never calls its trimmer.
        YourCodeFailed: it raised in every run. If some runs finished, failed ones are counted and reported.
        ValueError, TypeError: a setting is wrong, or a trimmer cannot drive a method. Nothing has been run by then.
    """
    local.leave_if_unguarded()
    code = Code.in_file(train, "train") if isinstance(train, str) else Code.of(train)
    if isinstance(seeds, str):
        raise TypeError(f"expected `seeds` to be a number of seeds or a list of them, got {describe(seeds)}.")
    if not isinstance(methods, Iterable):
        raise TypeError(f"expected `methods` to be names such as ['full', 'trim'], got {describe(methods)}.")
    _check_place(out, ray)
    check_count("retries", retries, minimum=0)
    for name, flag in (("tensorboard", tensorboard), ("quiet", quiet)):
        check_flag(name, flag)
    listed = list(seeds) if isinstance(seeds, Iterable) else plain(seeds)
    methods = [each.strip() for each in methods.split(",")] if isinstance(methods, str) else list(methods)
    if baseline != "full":  # if the baseline was not run, another is used
        check_choice("baseline", baseline, methods)
    configs = grid.expand_task(code, {"methods": methods, "seeds": listed, **settings})
    workers, threads = cores.share_cores(len(configs), workers)
    configs = cores.with_threads(configs, threads, settings, bool(ray))
    notes = preflight.warnings_for({"methods": methods, "seeds": listed, **settings}, configs)
    if workers > 1 or ray:
        code.__getstate__()  # report what cannot be sent to another process before the first run
    folder = Path(out) if out is not None else default_out(configs)
    shared = scheduler.SharedOptions(folder, tensorboard=tensorboard)
    with progress.Quiet() if quiet else progress.Live() as watcher:
        for note in notes:
            watcher.note(note)
        failed = scheduler.run_all(list(configs), shared, watcher, workers=workers, ray=ray, retries=retries)
    rows = records.read(folder)
    for row in failed:
        if row.get("mistake"):
            raise TaskMistake(row["error"])
    if failed and not any(row["status"] in records.DONE for row in rows):
        raise YourCodeFailed(f"every run failed: {failed[0].get('traceback') or failed[0]['error']}")
    for text in dict.fromkeys(row.get("traceback") or row["error"] for row in failed):
        print(text, file=sys.stderr)
    there = {row["config"]["method"] for row in rows}
    baseline = baseline if baseline in there else next(iter(methods))
    page = report.write_report(rows, folder, baseline)
    summary = comparison.summarize(rows, baseline)
    if not quiet:
        tables.print_table(summary)
        print(f"report: {page}")
    return summary


def run_once(
    train: Callable[[Run], Mapping[str, Any]] | str, method: str = "trim", seed: int = 0, **settings: Any
) -> float:
    """Do one run of a training function without recording it, and return its metric: for a search over schedules.

    Args:
        train: as for :func:`compare`.
        settings: as for :func:`compare`, with one value each; and ``out``, the parent folder of ``run.out``, by default
            ``runs/once``.

    Raises:
        TaskMistake, YourCodeFailed, ValueError, TypeError: as in :func:`compare`. ArithmeticError: the run diverged.
    """
    out = Path(settings.pop("out", "runs/once"))
    code = Code.in_file(train, "train") if isinstance(train, str) else Code.of(train)
    params = settings.pop("params", {})
    if not isinstance(params, Mapping):
        raise TypeError(f"expected `params` to be a mapping of methods to their parameters, got {describe(params)}.")
    params = params.get(method, {})
    config = replace(
        TaskConfig.from_dict({"task": code.name, "method": method, "seed": seed, **settings}),
        method_params=params, code=code,
    ).resolved()  # fmt: skip
    check_task(config)
    row = perform(config, out)
    if row["status"] == "finished":
        return float(row[Metric.of(row["config"]).field])
    if row["status"] == "diverged":
        raise ArithmeticError(row["error"])
    raise TaskMistake(row["error"]) if row.get("mistake") else YourCodeFailed(row.get("traceback") or row["error"])


def summarize(
    rows: Iterable[Mapping[str, Any]],
    baseline: str = "full",
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
) -> Summary:
    """Compare methods from another program's results, paired by seed, and return the comparison as data.

    Args:
        rows: one mapping per run with ``method``, ``seed``, the metric and, if known, ``time`` in seconds. Or rows of
            ``runs.jsonl``.
        baseline: the method the others are compared with. Without runs of "full", the default compares nothing.
        metric: the field to compare; by default the only other one.
        higher_is_better: needed if the name does not imply it.

    Example:
        >>> rows = [{"method": m, "seed": s, "rmse": 1.0 + 0.1 * s - 0.2 * (m == "trim") + 0.01 * (m == "trim") * s}
        ...         for m in ("full", "trim") for s in range(5)]
        >>> summarize(rows).groups[0].arms[1].paired.moments.n
        5
    """
    if higher_is_better is not None:
        check_flag("higher_is_better", higher_is_better)
    if not isinstance(rows, Iterable) or isinstance(rows, (str, Path, Mapping)):
        raise _no_rows(rows)
    rows = list(rows)
    for row in rows:
        if not isinstance(row, Mapping):
            raise _no_rows(row)
    if rows and all("config" in row for row in rows):
        records = [dict(row) for row in rows]
    else:
        records = csv_table.to_records(rows, "rows", metric, higher_is_better)
    summary = comparison.summarize(records, baseline)
    comparison.check_baseline(records, baseline)
    return summary


def _check_place(out: Any, ray: Any) -> None:
    if out is not None and not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"expected `out` to be the path of a folder, got {describe(out)}.")
    if ray is not None and not isinstance(ray, str):
        raise TypeError(f"expected `ray` to be the address of a cluster or 'auto', got {describe(ray)}.")


def _no_rows(got: object) -> TypeError:
    return TypeError(
        f"expected `rows` to be a list of mappings such as {{'method': 'trim', 'seed': 0, 'error': 0.1}}, got "
        f"{describe(got)}. From a data frame: frame.to_dict('records'); from a file: list(csv.DictReader(file))."
    )


def default_out(configs: Sequence[TaskConfig]) -> Path:
    """Return a folder named after the task, so that the same call finds it again."""
    name = configs[0].task.replace(".py:", "-").replace(":", "-")
    epochs = sorted({config.epochs for config in configs})
    return Path("runs") / f"{name}-{'+'.join(map(str, epochs))}ep"
