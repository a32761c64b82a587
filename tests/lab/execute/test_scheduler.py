"""Many runs: in this process, in several, on a Ray cluster; with workers that die in between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from batchtrim.lab import records
from batchtrim.lab.execute import cores, grid, local, one_run, progress, scheduler
from batchtrim.lab.records import UseAnotherFolder
from batchtrim.lab.run import train
from batchtrim.lab.run.config import RunConfig

TINY = {"methods": ["full", "trim"], "seeds": 2, "epochs": 2, "train_size": 200, "batch_size": 64}


class Spy(progress.Quiet):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.done = 0
        self.epochs: list[str] = []
        self.rows: list[Any] = []
        self.notes: list[str] = []

    def begin(self, configs: list[RunConfig], done: int) -> None:
        self.done = done

    def epoch(self, config: RunConfig, point: dict[str, Any]) -> None:
        self.epochs.append(config.key)

    def finished(self, config: RunConfig, row: Any) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)


def go(folder: Path, settings: dict[str, Any] = TINY, **options: Any) -> Spy:
    spy = Spy()
    scheduler.run_all(grid.expand(settings), scheduler.SharedOptions(folder), spy, **options)
    return spy


# --- in this process ----------------------------------------------------------------------------------------------


def test_every_run_is_recorded_and_done_once(tmp_path: Path) -> None:
    spy = go(tmp_path)
    assert len(spy.rows) == 4
    assert len(spy.epochs) == 8
    assert {row["key"] for row in records.read(tmp_path)} == {config.key for config in grid.expand(TINY)}
    again = go(tmp_path)
    assert (again.done, again.rows) == (4, [])


def test_seeds_and_methods_may_be_added(tmp_path: Path) -> None:
    go(tmp_path)
    assert len(go(tmp_path, {**TINY, "seeds": 3, "methods": ["full", "trim", "random"]}).rows) == 5


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.raises(UseAnotherFolder, match="batch_size 64 there and 32 here; epochs 2 there and 3 here"):
        go(tmp_path, {**TINY, "epochs": 3, "batch_size": 32})


def test_a_run_that_fails_is_recorded_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: RunConfig, **_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_run", broken)
        failed = scheduler.run_all(grid.expand(TINY), scheduler.SharedOptions(tmp_path), Spy())
    assert [row["error"] for row in failed] == ["MemoryError: no room"] * 4
    assert {row["status"] for row in records.read(tmp_path)} == {"failed"}
    go(tmp_path)
    assert {row["status"] for row in records.read(tmp_path)} == {"finished"}


def test_a_run_that_diverges_stays_in_the_record(tmp_path: Path) -> None:
    go(tmp_path, {**TINY, "lr": 1e30, "optimizer": "sgd"})
    assert {row["status"] for row in records.read(tmp_path)} == {"diverged"}
    assert go(tmp_path, {**TINY, "lr": 1e30, "optimizer": "sgd"}).rows == []


def test_ctrl_c_keeps_what_has_finished(tmp_path: Path) -> None:
    class Impatient(Spy):
        def epoch(self, config: RunConfig, point: dict[str, Any]) -> None:
            super().epoch(config, point)
            if len(self.epochs) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scheduler.run_all(grid.expand(TINY), scheduler.SharedOptions(tmp_path), Impatient())
    assert len(records.read(tmp_path)) == 1
    assert go(tmp_path).done == 1
    assert len(records.read(tmp_path)) == 4


def test_a_long_run_continues_from_its_checkpoint(tmp_path: Path) -> None:
    settings = {**TINY, "methods": ["trim"], "seeds": 1, "epochs": 4}
    shared = scheduler.SharedOptions(tmp_path, checkpoint_seconds=0.0)

    class StopsAtThree(Spy):
        def epoch(self, config: RunConfig, point: dict[str, Any]) -> None:
            super().epoch(config, point)
            if len(self.epochs) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scheduler.run_all(grid.expand(settings), shared, StopsAtThree())
    rest = Spy()
    scheduler.run_all(grid.expand(settings), shared, rest)
    assert len(rest.epochs) == 2  # the third had not been saved yet
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_fault_in_the_data_is_found_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such folder"):
        scheduler.run_all(
            grid.expand({**TINY, "dataset": "svhn", "model": "cnn"}),
            scheduler.SharedOptions(tmp_path, str(tmp_path)),
            Spy(),
        )
    assert not (tmp_path / "runs.jsonl").exists()


def test_what_another_process_is_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ASK_AGAIN", 0.01)
    configs = grid.expand(TINY)
    other = records.Records(tmp_path)
    held = contextlib.ExitStack()
    held.enter_context(other.claim(configs[0].key))

    class Releases(Spy):
        def note(self, text: str) -> None:
            super().note(text)
            if len(self.notes) == 2:
                other.append(train.train_run(configs[0]))
                held.close()

    spy = Releases()
    scheduler.run_all(configs, scheduler.SharedOptions(tmp_path), spy)
    assert len(records.read(tmp_path)) == 4
    assert spy.rows.count(None) == 1
    assert "another process" in spy.notes[0]


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cores.share_cores(100) == (8, 2)
    assert cores.share_cores(1) == (1, 16)
    assert cores.share_cores(100, workers=5) == (5, 3)
    assert cores.share_cores(100, workers=40) == (40, 1)


# --- in several processes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_do_every_run_once_with_the_same_results(tmp_path: Path) -> None:
    spy = go(tmp_path / "two", workers=2)
    go(tmp_path / "one")
    assert len(spy.epochs) == 8
    errors = [
        {row["key"]: row["curve"]["test_error"] for row in records.read(tmp_path / name)} for name in ("one", "two")
    ]
    assert errors[0] == errors[1]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_run_done_again(tmp_path: Path) -> None:
    class Murderer(Spy):
        killed = False

        def epoch(self, config: RunConfig, point: dict[str, Any]) -> None:
            super().epoch(config, point)
            if not self.killed:
                self.killed = True
                children = subprocess.run(
                    ["pgrep", "-P", str(os.getpid()), "-f", "spawn_main"], capture_output=True, text=True
                )
                os.kill(int(children.stdout.split()[0]), signal.SIGKILL)

    spy = Murderer()
    failed = scheduler.run_all(grid.expand({**TINY, "epochs": 40}), scheduler.SharedOptions(tmp_path), spy, workers=2)
    assert failed == []
    assert any("exit code -9; trying again" in note for note in spy.notes)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_run_that_kills_every_worker_is_recorded_as_failed(tmp_path: Path) -> None:
    """The network is too large for any memory: the kernel's killer is played by a limit on the address space."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from batchtrim.lab.execute import grid, progress, scheduler\n"
        "import batchtrim.lab.run.train as train\n"
        "if __name__ == '__main__':\n"
        "    configs = grid.expand({'methods': ['full'], 'seeds': [0, 1], 'epochs': 1, 'train_size': 100})\n"
        "    class Killer(progress.Quiet):\n"
        "        def note(self, text): print(text)\n"
        "    shared = scheduler.SharedOptions(Path(sys.argv[1]), cache_dir=None)\n"
        "    failed = scheduler.run_all(configs, shared, Killer(), workers=2, retries=1)\n"
        "    print(len(failed))\n"
        "else:\n"
        "    import os\n"
        "    def die(*_, **__): os.kill(os.getpid(), 9)\n"
        "    train.train_run = die\n"
    )
    (tmp_path / "sweep_that_kills.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "sweep_that_kills.py"), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "2"
    rows = records.read(tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "exit code -9, 2 times" in rows[0]["error"]


def kill_sweeps(folder: Path, kills: int, workers: int) -> None:
    """kill -9 a sweep at random moments, then let it end: every run is there once, and none was lost on the way."""
    code = (
        "import sys; from pathlib import Path\n"
        "from batchtrim.lab.execute import grid, progress, scheduler\n"
        "if __name__ == '__main__':\n"
        f"    configs = grid.expand({{'methods': ['full', 'trim'], 'seeds': 20, 'epochs': 2, 'train_size': 200}})\n"
        f"    scheduler.run_all(configs, scheduler.SharedOptions(Path(sys.argv[1])), progress.Quiet(), "
        f"workers={workers})\n"
    )
    folder.mkdir()
    (folder / "job.py").write_text(code)
    command = [sys.executable, str(folder / "job.py"), str(folder / "out")]
    draw = random.Random(workers)
    seen: list[str] = []
    path = folder / "out" / "runs.jsonl"
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        begun, wanted = time.monotonic(), len(seen) + draw.randint(1, 6)
        while process.poll() is None and time.monotonic() - begun < 60:
            if path.exists() and path.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        now = [row["key"] for row in records.read(folder / "out")]
        assert now[: len(seen)] == seen
        seen = now
    subprocess.run(command, check=True)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 40
    assert keys[: len(seen)] == seen


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_sweep_continues(tmp_path: Path, workers: int) -> None:
    kill_sweeps(tmp_path / "sweep", kills=2, workers=workers)


@pytest.mark.slow
def test_two_sweeps_on_one_folder_share_the_work(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from batchtrim.lab.execute import grid, progress, scheduler\n"
        "configs = grid.expand({'methods': ['full', 'trim'], 'seeds': 20, 'epochs': 4, 'train_size': 600})\n"
        "scheduler.run_all(configs, scheduler.SharedOptions(Path(sys.argv[1])), progress.Quiet())\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(200) for process in processes] == [0, 0]
    keys = [json.loads(line)["key"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 40


# --- on a Ray cluster ---------------------------------------------------------------------------------------------


def test_a_missing_cluster_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def nothing_there(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nothing_there)
    with pytest.raises(ConnectionError, match=r"a Ray cluster at 'auto', got none .*ray start --head"):
        go(tmp_path, ray="auto")


@pytest.mark.slow
@pytest.mark.timeout(600)  # on a busy machine Ray needs minutes to start workers anew
@pytest.mark.filterwarnings("default")
def test_a_cluster_that_loses_a_node_does_every_run_once(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    try:
        settings = {**TINY, "seeds": 6, "epochs": 60, "train_size": None, "threads": 1}

        class Saboteur(Spy):
            def finished(self, config: RunConfig, row: Any) -> None:
                super().finished(config, row)
                if len(self.rows) == 3:
                    cluster.remove_node(second, allow_graceful=False)

        spy = Saboteur()
        failed = scheduler.run_all(
            grid.expand(settings), scheduler.SharedOptions(tmp_path), spy, ray=cluster.address, retries=3
        )
        assert failed == []
        keys = [json.loads(line)["key"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
        assert sorted(keys) == sorted(config.key for config in grid.expand(settings))
        assert len(set(spy.epochs)) > 3, "epochs are told while runs go on"
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_missing_tensorboard_is_reported_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    shared = scheduler.SharedOptions(tmp_path / "out", tensorboard=True)
    with pytest.raises(ImportError, match="--tensorboard needs `tensorboard`"):
        scheduler.run_all(grid.expand(TINY), shared, progress.Quiet())
    assert not (tmp_path / "out").exists()


def test_events_for_tensorboard_need_tensorboard(tmp_path: Path) -> None:
    config = grid.expand(TINY | {"eval_every": 2})[0]  # the first epoch is not tested
    shared = scheduler.SharedOptions(tmp_path, tensorboard=True)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert "needs `tensorboard`" in one_run.do_run(config, shared)["error"]
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        row = one_run.do_run(config, shared)
        assert row["status"] == "finished"
        (events,) = (tmp_path / "tensorboard").rglob("events.*")
        written = EventAccumulator(str(events)).Reload()
        tested = [value for value in row["curve"]["test_error"] if value is not None]
        assert [event.value for event in written.Scalars("test_error")] == pytest.approx(tested)
        assert len(tested) == 1 < len(written.Scalars("keep"))
