"""Do one run of the user's training function: everything around the call that makes its result comparable."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchtrim import TrimmedForward, Trimmer
from batchtrim._checks import describe
from batchtrim.lab import process
from batchtrim.lab.files import CannotWrite, writing
from batchtrim.lab.metric import Metric
from batchtrim.lab.records import SCHEMA
from batchtrim.lab.run.batch_progress import OnEpoch
from batchtrim.lab.run.environment import environment
from batchtrim.lab.run.failed import error_line
from batchtrim.lab.run.process_state import ProcessChanges, seeded_and_restored
from batchtrim.lab.run.remarks import remarks
from batchtrim.lab.run.side_effects import SideEffects
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.run.task_run import Run, TaskMistake, as_number, check_share
from batchtrim.lab.task.own_code import as_a_program, own_traceback
from batchtrim.selection.base import k_follows_losses

__all__ = ["check_task", "perform"]

LONGEST_TRACEBACK = 4000
SHORT = 60.0  # imports matter in runs of up to this many seconds


def check_task(config: TaskConfig) -> None:
    """Load the function, to find a fault in its file before the first run."""
    assert config.code is not None
    with process.restored():
        config.code.load()


def perform(config: TaskConfig, out: Path, on_epoch: OnEpoch | None = None) -> dict[str, Any]:
    """Call the training function once and return its row for ``runs.jsonl``, even if it fails.

    Args:
        config: resolved, with its code.
        out: the folder of records; the run's own folder, keep log and page are under it.
        on_epoch: called whenever the function logs.

    Notes:
        torch, NumPy and ``random`` are seeded with the run's seed. What the function changes in the process (random
        state, threads, default dtype and device, modes of torch and NumPy, environment variables, signal handlers,
        working folder, locale, standard streams, warnings that it made errors) is restored. If the function forks a
        process that returns too, that process ends here.
    """
    assert config.code is not None
    _import_ahead(config.engine)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    begun = time.perf_counter()
    out = out.absolute()  # the function may change the working folder
    run = Run(config, out / "tasks" / config.key, on_epoch)
    result: dict[str, Any]
    with seeded_and_restored(config.seed, config.threads) as changes:
        try:
            function = config.code.load()
            effects = SideEffects(function)
            changes.begin()
            begun = run.rule.counts.begun = time.perf_counter()  # importing the file is not part of training
            with as_a_program(config.code.path):
                returned = function(run)
            seconds = time.perf_counter() - run.rule.counts.begun  # of earlier attempts too, if it continued from one
            result = {
                "seconds": seconds,
                **_value(returned, run.metric),
                **_notes_on_run(run, config, changes, effects, seconds),
            }
            _write_log(run, config, out)
        except CannotWrite:  # a fault of the disk, not of the task
            raise
        except TaskMistake as error:
            result = {"status": "failed", "error": str(error), "mistake": True}
        except SystemExit as error:
            hint = ". As a task it has no command-line arguments: give those of argparse defaults" * (error.code == 2)
            told = f"the task called exit({error.code}); return the result instead{hint}"
            result = {"status": "failed", "error": told}
        except BaseException as error:  # an error in the user's code: record it, and continue with the other runs
            if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                raise  # Ctrl-C, which a worker ignores
            result = {"status": "failed", "error": error_line(error)}
            result["traceback"] = own_traceback(error)[-LONGEST_TRACEBACK:]
    return {
        "schema": SCHEMA,
        "key": config.key,
        "config": config.to_dict(),
        "test_error": None,
        "seconds": time.perf_counter() - begun,
        **result,
        "seconds_eval": 0.0,
        **_counts(run),
        "curve": run.curve,
        "environment": environment(config),
        "started": started,
    }


@functools.cache
def _import_ahead(engine: str) -> None:
    """Do two steps, so that torch imports its compiler and the engine's modules outside any run's training time."""
    if engine == "auto":  # which imports them once a model is large enough
        import batchtrim.engine.shared  # noqa: F401
    with (
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(action="ignore"),
    ):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = TrimmedForward(model, torch.nn.MSELoss(), Trimmer(0.5), engine)
        for _ in range(2):
            step(torch.ones(8, 1), torch.ones(8, 1)).backward()
            optimizer.step()


def _value(returned: Any, metric: Metric) -> dict[str, Any]:
    """Return the status and value of a run from the function's result."""
    example = f'return {{"{metric.name}": ...}}'
    if not isinstance(returned, Mapping):
        raise TaskMistake(f"expected the task to {example}, got {describe(returned)}.")
    if metric.name not in returned:
        there = ", ".join(map(str, returned)) or "nothing in it"
        raise TaskMistake(
            f"expected the task to {example} in every run, got {there}. "
            "To compare by another number, name it: --metric, or metric= in Python."
        )
    try:
        value = as_number(metric.name, returned[metric.name])
    except TypeError as error:
        raise TaskMistake(f"{error} The task returned it.") from None
    if not math.isfinite(value):
        return {"status": "diverged", "error": f"the task returned {metric.name} {value:g}"}
    if metric.in_percent:
        check_share(metric, value)
    also = {}
    for name, each in returned.items():
        if name != metric.name:
            with contextlib.suppress(TypeError):
                also[str(name)] = as_number(str(name), each)
    return {"status": "finished", metric.field: value, **({"also": also} if also else {})}


def _notes_on_run(
    run: Run, config: TaskConfig, changes: ProcessChanges, effects: SideEffects, seconds: float
) -> dict[str, Any]:
    """Return the notes on a successful run; raise an error if the method was never applied."""
    run.epochs, run.seed, run.method = config.epochs, config.seed, config.method  # the task may have changed them
    said = remarks(config)
    notes, more = [*said, *_notes_on_keep(run, explained=bool(said))], {}
    if run.trim.rule is not run.rule:
        raise TaskMistake(
            f"expected the task to choose by run.trim.rule, which makes the run one of {run.method!r}, got another "
            f"in its place: {run.trim.rule!r}. A rule that changes on the way is assigned to run.rule.rule, "
            "which counts its choices; results with a rule of your own: batchtrim report --csv."
        )
    if run.method != "full" and not run.rule.counts.used:
        if not run.rule.counts.sent:
            raise TaskMistake(
                f"expected the task to choose with run.trim, got a run of {run.method!r} in which it was never called: "
                "that is plain training. Call run.trim(losses) in place of the mean of the losses, use run.forward, or "
                "give a trainer run.keep and run.trim_options."
            )
        notes.append(
            "run.trim was copied to another process and not called in this one, so it is not known whether it chose"
        )
    if run.method != "full" and not run.engine_used and not run.rule.counts.sent:
        notes.append(
            "--engine had no effect, since the task did not call run.forward, which applies it. A trainer takes an "
            "engine of its own: TrimmedTrainer(engine=...)"
        )
    if changed := effects.changed():
        notes.append(
            f"the task changed {', '.join(changed[:3])}{', ...' * (len(changed) > 3)}, which it did not make: the next "
            "run in the process starts from there. Make it in the function"
        )
    if run.found and not run.rule.counts.continued:
        notes.append(
            f"the run's folder held files of an earlier attempt ({', '.join(run.found[:3])}"
            f"{', ...' * (len(run.found) > 3)}): if the task continued from them, its time and samples are those of "
            "the last attempt alone. Save run.trim.state_dict() with them, and load it, to count all"
        )
    if run.rule.counts.changed:
        notes.append(
            "the run continued from a state that another version of the task saved, so its parts are of two programs. "
            "To run one, pass another --out"
        )
    if changes.torch_seed != run.seed:
        more["torch_seed"] = changes.torch_seed  # judged together with other seeds in batchtrim.lab.analyse.caveats
    if seconds < SHORT and (names := changes.imported()):
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        notes.append(
            f"the first run of a process imported {listed} during the call, which adds to its time: import at the "
            "top of the file"
        )
    for one, many, left in (("thread", "threads", changes.threads()), ("process", "processes", changes.processes())):
        if left:
            notes.append(f"the task left {len(left)} {many if len(left) > 1 else one} running ({', '.join(left[:3])})")
    return {**more, **({"notes": notes} if notes else {})}


def _notes_on_keep(run: Run, explained: bool) -> list[str]:
    """Return notes on a schedule that did not run as far as it should, and on a run that kept everything.

    Args:
        explained: the run's settings have a remark that says why.
    """
    notes = []
    counts, schedule_moves = run.rule.counts, _moves(run)
    if schedule_moves and run.trim.steps == 0 and run.trim.last is not None:
        raise TaskMistake(
            f"expected the task to call run.trim.step() once an epoch, got a run of {run.method!r} without: all of "
            f"it kept {run.trim.keep:g}, the schedule's start."
        )
    if schedule_moves and run.trim.steps == 0 and counts.compiled:  # run.trim, or another trimmer with its rule
        notes.append(
            f"run.trim.step() was not called: if compiled steps call run.trim, all of them kept {run.trim.keep:g}"
        )
    elif schedule_moves and (run.trim.last is not None or counts.compiled):
        often = "once" if run.trim.steps == 1 else f"{run.trim.steps} times"
        if run.trim.steps < run.epochs - 1:
            notes.append(
                f"run.trim.step() was called {often} in {run.epochs} epochs, so the schedule ended at "
                f"keep {run.trim.keep:.2g}"
            )
        if run.trim.steps > run.epochs:
            notes.append(
                f"run.trim.step() was called {often} in {run.epochs} epochs, so the schedule was over "
                f"after {(run.epochs - 1) / run.trim.steps:.0%} of them"
            )
    if counts.counted and counts.kept == counts.seen and _may_drop(run):
        hint = "" if explained else ": check that the trimmer's clock steps, and that batches have several samples"
        notes.append(f"every one of the {counts.seen:,} samples was kept, as in plain training{hint}")
    return notes


def _may_drop(run: Run) -> bool:
    """True if the method drops samples at some point of training, or by their losses."""
    schedules = run.trim.schedule, run.keep_in_two_epochs
    return k_follows_losses(run.rule.rule) or any(each(part) < 1.0 for each in schedules for part in (0.0, 0.5, 1.0))


def _moves(run: Run) -> bool:
    """True if the keep fraction changes over the run's epochs."""
    schedule = run.trim.schedule
    if not getattr(schedule, "needs_total", True) or getattr(schedule, "reads", "progress") != "progress":
        return False
    return run.epochs > 1 and len({schedule(epoch / (run.epochs - 1)) for epoch in range(run.epochs)}) > 1


def _counts(run: Run) -> dict[str, Any]:
    """Return the numbers of samples seen and kept; None if the trimmer saw none, as in plain training, or not all."""
    counts = run.rule.counts
    if not counts.counted:
        return {"samples_forward": None, "samples_backward": None, "steps": None}
    return {
        "samples_forward": counts.seen + counts.repeated,
        "samples_backward": counts.kept,
        "steps": counts.calls,
    }


def _write_log(run: Run, config: TaskConfig, out: Path) -> None:
    """Write the keep log, and beside it the description of its samples, for ``batchtrim show``."""
    if run.kept is None:
        return
    path = out / "keep" / f"{config.key}.parquet"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        run.kept.to_parquet(path)
        if run.shown is None:
            return
        if run.shown["images"] is not None:
            np.save(path.with_suffix(".npy"), run.shown["images"], allow_pickle=False)
        text = json.dumps({name: value for name, value in run.shown.items() if name != "images"}, default=str)
        path.with_suffix(".json").write_text(text, encoding="utf-8")
