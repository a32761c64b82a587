"""Workers of tasks: processes that the user's code starts in them work, and end with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchtrim.lab import records
from batchtrim.lab.execute import local
from commands import batchtrim


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


LOADS = """
import multiprocessing, os, signal, torch

def train(run):
    data = torch.utils.data.DataLoader(torch.rand(16), batch_size=8, num_workers=1)
    for epoch in range(run.epochs):
        for losses in data:
            run.trim(losses)
        run.trim.step()
    if run.method == "random":  # killed, as for want of memory, while children hold what they inherited
        multiprocessing.get_context("fork").Pool(1).map(abs, [1])
        os.kill(os.getpid(), signal.SIGKILL)
    return {"error": 0.5, "own": multiprocessing.get_start_method() == multiprocessing.get_all_start_methods()[0]}
"""


@pytest.mark.slow
def test_a_task_may_load_its_data_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers were daemons, which may have no children: num_workers failed. Children outlived a worker that died."""
    Path("loads.py").write_text(LOADS)
    worker, started = local._Worker, []
    monkeypatch.setattr(local, "_Worker", lambda shared: (started.append(shared), worker(shared))[1])
    done = batchtrim(
        "compare", "--task", "loads.py:train", "--methods", "full,random", "--seeds", "1", "--epochs", "2", "--workers",
        "1", "--out", "here", "--retries", "0",
    )  # fmt: skip
    assert [row["status"] for row in records.read("here")] == ["finished", "failed"], done.output
    assert "its worker ended with exit code -9" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(started) == 1, "no run was left when it died"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "torch", "batchtrim"])
def test_a_task_may_have_the_name_of_a_library(name: str, tmp_path: Path) -> None:
    """Workers imported it, or a file of such a name beside it, in place of the library, and ended with tracebacks."""
    Path("mine").mkdir()
    for path in (Path("mine", f"{name}.py"), Path("mine", "json.py")):
        path.write_text("def train(run):\n    run.trim(__import__('sys').modules['torch'].rand(8))\n"
                        "    run.trim.step()\n    return {'error': 0.5}\n")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "batchtrim", "compare", "--task", f"mine/{name}.py:train", "--methods", "full",
         "--seeds", "1", "--epochs", "1", "--workers", "1", "--out", "here"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in records.read("here")] == ["finished"]


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so_once(tmp_path: Path) -> None:
    """Each worker failed three times with a traceback of 60 lines, and the program was said to end the process."""
    Path("script.py").write_text(
        "from batchtrim.lab import compare\n"
        "def train(run): ...\n"
        "compare(train, ['full', 'trim'], 2, workers=2, out='here')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "script.py"], env=environment, capture_output=True, text=True)
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert "ValueError: expected the call that starts workers under `if __name__ == '__main__':`" in done.stderr
    assert not Path("here/runs.jsonl").exists()


STARTS = """
import os, subprocess, time, torch

def train(run):
    open("pids", "a").write(f"{subprocess.Popen(['sleep', '200']).pid} {os.getpid()} ")
    for epoch in range(600):
        time.sleep(0.1)
        run.log(error=0.5)

def silent(run):
    open("pids", "a").write(f"{subprocess.Popen(['sleep', '200']).pid} {os.getpid()} ")
    time.sleep(200)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "task"),
    [(signal.SIGINT, "train"), (signal.SIGKILL, "train"), (signal.SIGINT, "silent"), (signal.SIGTERM, "silent")],
)
def test_what_a_task_started_ends_with_the_command(how: signal.Signals, task: str, tmp_path: Path) -> None:
    """It outlived Ctrl-C; after kill -9 it was recorded as one that called exit; one that logs nothing ran on."""
    Path("starts.py").write_text(STARTS)
    words = ["compare", "--task", f"starts.py:{task}", "--seeds", "1", "--workers", "1", "--out", "here"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "batchtrim.lab.cli", *words], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )  # fmt: skip
    end = time.monotonic() + 60
    while not Path("pids").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    said = process.communicate()[1]
    assert "Traceback" not in said
    while any(_lives(pid) for pid in Path("pids").read_text().split()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not Path("here/runs.jsonl").exists()


def _lives(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
