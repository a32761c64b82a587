"""Runs on a Ray cluster: each run is a Ray task, and only the driver writes the record.

Every node needs batchtrim with its lab extra, and the data set, in a folder at the same path or from the hub. The file
of a task must be at the same path too; a function from a notebook is sent along.
"""

from __future__ import annotations

import contextlib
from typing import Any

from batchtrim._checks import import_extra
from batchtrim.lab.execute import bounded_wait
from batchtrim.lab.execute.one_run import RunQueue, SharedOptions, do_run
from batchtrim.lab.files import CannotWrite
from batchtrim.lab.records import Records, Row
from batchtrim.lab.run.failed import failed_row
from batchtrim.lab.run.task_config import AnyConfig

LOOK_EVERY = 0.5  # seconds between two checks of the runs' progress


def run_on_ray(queue: RunQueue, records: Records, shared: SharedOptions, address: str, retries: int) -> None:
    """Do the remaining runs of ``queue`` as Ray tasks, each with as many CPUs as its run has threads.

    If a task's worker or node is lost, Ray repeats it up to ``retries`` times; then its run is recorded as failed.

    Raises:
        ConnectionError: there is no cluster at ``address``.
    """
    ray = import_extra("ray", "ray", "--ray")
    try:
        bounded_wait.check_address(address)
        bounded_wait.in_time(
            lambda: ray.init(address=address, log_to_driver=False, ignore_reinit_error=True, logging_level="error")
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"expected a Ray cluster at {address!r}, got none ({_sentence(error)}). Start one with: ray start --head"
        ) from error
    task = ray.remote(_task)
    mailbox = ray.remote(_Mailbox).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    with contextlib.ExitStack() as all_claims:
        claims: dict[Any, tuple[AnyConfig, contextlib.ExitStack]] = {}
        window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # a few queued runs keep every node busy
        while queue.left or claims:
            while queue.left and len(claims) < window:
                config = queue.left.popleft()
                claim = all_claims.enter_context(contextlib.ExitStack())
                if not claim.enter_context(records.claim(config.key)):
                    claim.close()
                    queue.watcher.note(f"{config.label}: skipped: another process is running it")
                    queue.settle(config, None)
                    continue
                gpus = 1 if config.device == "cuda" else 0
                here = task.options(num_cpus=config.threads, num_gpus=gpus, max_retries=retries, name=config.label)
                claims[here.remote(config, shared, mailbox)] = config, claim
            finished = ray.wait(list(claims), num_returns=1, timeout=LOOK_EVERY)[0] if claims else []
            running = {config.key: config for config, _ in claims.values()}
            for key, point in _news(ray, mailbox):
                if key in running:
                    queue.tell(running[key], point)
            for done in finished:
                config, claim = claims.pop(done)
                row = _result(ray, done, config)
                records.append(row)
                claim.close()
                queue.settle(config, row)


def _sentence(error: Exception) -> str:
    """Return the whole first sentence of an error."""
    return str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")


class _Mailbox:
    """An actor that runs report progress to after every epoch. It holds no records, so losing it does no harm."""

    def __init__(self) -> None:
        self.news: list[tuple[str, dict[str, Any]]] = []

    def put(self, key: str, point: dict[str, Any]) -> None:
        self.news.append((key, point))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        news, self.news = self.news, []
        return news


def _news(ray: Any, mailbox: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the reports since the last call; none if the mailbox does not answer at once."""
    try:
        return ray.get(mailbox.take.remote(), timeout=LOOK_EVERY)
    except ray.exceptions.RayError:
        return []


def _task(config: AnyConfig, shared: SharedOptions, mailbox: Any) -> Row:
    """Do a run on a node; its checkpoint is useful if all nodes see the output folder."""
    row = do_run(config, shared, lambda point: mailbox.put.remote(config.key, point))
    with contextlib.suppress(OSError):
        shared.clear(config, row)
    return row


def _result(ray: Any, reference: Any, config: AnyConfig) -> Row:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, CannotWrite):  # no run is to blame, as on this machine
            raise CannotWrite(str(cause)) from None
        return failed_row(config, error)
