"""Schedule many runs: decide which are still to do, and hand them to workers. A rerun resumes here."""

from __future__ import annotations

import collections
from pathlib import Path

from batchtrim._checks import check_count, import_extra
from batchtrim.lab.execute import grid, local, on_ray
from batchtrim.lab.execute.one_run import DATA_DIR, RunQueue, SharedOptions, Watcher, do_run
from batchtrim.lab.execute.versions import check_program
from batchtrim.lab.files import writing
from batchtrim.lab.records import Records, Row
from batchtrim.lab.run import loading
from batchtrim.lab.run.config import SETTINGS
from batchtrim.lab.run.perform import check_task
from batchtrim.lab.run.ranks import Ranks
from batchtrim.lab.run.settings import Role
from batchtrim.lab.run.task_config import AnyConfig, TaskConfig


def run_all(
    configs: list[AnyConfig],
    shared: SharedOptions,
    watcher: Watcher,
    *,
    workers: int = 1,
    ray: str | None = None,
    retries: int = 2,
    isolated: bool = False,
) -> list[Row]:
    """Do all runs that are not yet recorded in ``shared.out``; return the rows of failed ones.

    Args:
        configs: resolved, see :func:`batchtrim.lab.execute.grid.expand`.
        workers: processes on this machine; 1 uses this process.
        ray: address of a Ray cluster, or "auto", instead of processes here.
        retries: how often a run whose worker died is given to another worker.
        isolated: use a separate process even if ``workers`` is 1, so that user code that exits or prints does not
            affect this one.

    Raises:
        UseAnotherFolder: the folder holds another experiment, or these runs by another version of the user's program.
        KeyboardInterrupt: passed on. Finished runs are recorded, and the same call continues from there.
    """
    check_count("workers", workers)
    if shared.tensorboard and not ray:  # otherwise every run would fail; on a cluster, the nodes need it instead
        import_extra("tensorboard", "tensorboard", "--tensorboard")
    records = Records(shared.out)
    records.settle(grid.cells(configs))
    changed = check_program(configs, records)
    left = collections.deque(config for config in configs if not records.is_done(config.key))
    if shared.data_dir and shared.keep_log:
        with writing(shared.out / DATA_DIR):
            (shared.out / DATA_DIR).write_text(str(Path(shared.data_dir).resolve()) + "\n", encoding="utf-8")
    watcher.begin(configs, len(configs) - len(left))
    if changed:
        watcher.note(changed)
    queue = RunQueue(left, watcher)
    if not left:
        return []
    if Ranks.from_environment().rank > 0:  # one run on several processes: the first of them writes the record
        return [row for config in left if (row := do_run(config, shared))["status"] == "failed"]
    if ray:
        on_ray.run_on_ray(queue, records, shared, ray, retries)
        return queue.failed
    for config in _one_per_data_set(left):  # find faults in the data or the task before any run
        if isinstance(config, TaskConfig):
            check_task(config)
        else:
            for note in loading.prepare(config, shared.data_dir, shared.cache_dir):
                watcher.note(note)
    if workers == 1 and not isolated:
        local.run_here(queue, records, shared)
    else:
        local.run_in_processes(queue, records, shared, min(workers, len(left)), retries)
    return queue.failed


def _one_per_data_set(configs: collections.deque[AnyConfig]) -> list[AnyConfig]:
    """Return one run per network and per task or training set, whatever the seed."""
    seen = {}
    for config in configs:
        made_by = tuple(getattr(config, name, None) for name, each in SETTINGS.items() if each.role is Role.DATA)
        network = [getattr(config, name, None) for name in ("model", "width", "norm", "batch_size")]
        seen.setdefault((*made_by, *network), config)
    return list(seen.values())
