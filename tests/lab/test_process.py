"""Every run finds the process as the others do: its generators, and what the user's file sets at its top."""

from __future__ import annotations

import locale
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from batchtrim import lab
from batchtrim.lab import process
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.train import train_run
from batchtrim.lab.task.own_code import Code
from launch import run_ranks

NETWORK = """
import random
import numpy as np
import torch
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * (0.5 + random.random() if self.training else 1.0)

def build(shape, classes):
    net = Net(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, classes))
    nn.init.constant_(net[1].bias, np.random.rand())
    return net
"""
TASK = """
import os
import pathlib
import torch
import numpy as np

os.environ["SET_AT_THE_TOP"] = "yes"
pathlib.Path("data").mkdir(exist_ok=True)
os.chdir("data")
torch.set_default_dtype(torch.float64)
torch.use_deterministic_algorithms(True)
np.seterr(over="raise")

def train(run):
    run.trim(torch.ones(4, requires_grad=True)).backward()
    run.trim.step()
    log = run.keep_log(4)
    log.record(run.trim.last, ids=torch.arange(4))
    log.end_epoch()
    bits = torch.zeros(()).itemsize * 8
    sure = int(torch.are_deterministic_algorithms_enabled())
    folder = int(pathlib.Path.cwd().name == "data" and os.environ.pop("SET_AT_THE_TOP") == "yes")
    return {"rmse": bits, "sure": sure, "folder": folder, "over": int(np.geterr()["over"] == "raise")}
"""
PRECISIONS = ["torch.backends.fp32_precision", "torch.backends.mkldnn.matmul.fp32_precision"]


def test_a_network_that_draws_repeats_and_resumes(tmp_path: Path) -> None:
    """From torch, NumPy and ``random``, in making it and in its forward."""
    (tmp_path / "drawing.py").write_text(NETWORK)
    config = RunConfig(model=f"{tmp_path / 'drawing.py'}:build", epochs=3, train_size=200, test_size=100)
    straight = train_run(config)["curve"]
    assert train_run(config)["curve"]["mean_loss"] == straight["mean_loss"]
    assert train_run(RunConfig(**{**vars(config), "eval_every": 3}))["curve"]["mean_loss"] == straight["mean_loss"]
    file = tmp_path / "checkpoints" / "run.pt"

    def stop(point: dict) -> None:
        if point["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(config, checkpoint=file, checkpoint_seconds=0, on_epoch=stop)
    assert train_run(config, checkpoint=file)["curve"]["mean_loss"] == straight["mean_loss"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Of another version of the network, or on more processes: the rest was trained otherwise, without a word."""
    (tmp_path / "drawing.py").write_text(f"import my_part\n{NETWORK}")
    (tmp_path / "my_part.py").write_text("size = 8")
    config = RunConfig(model=f"{tmp_path / 'drawing.py'}:build", epochs=2, train_size=200, test_size=100)
    file = tmp_path / "checkpoints" / "run.pt"
    train_run(config, checkpoint=file, checkpoint_seconds=0)
    state = torch.load(file)
    torch.save({**state, "ranks": 2 * state["ranks"]}, file)
    with pytest.raises(ValueError, match=r"a run on 1 processes, got one on 2\. Start it on as many .* The file is"):
        train_run(config, checkpoint=file)
    torch.save(state, file)
    for name in ("my_part.py", "drawing.py"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(f"{before}\nother = 1")
        with pytest.raises(ValueError, match=rf"the present {name}.*, got one of another version\. .* The file is"):
            train_run(config, checkpoint=file)
        (tmp_path / name).write_text(f"{before}  # only a comment")
    assert train_run(config, checkpoint=file)["curve"]["epoch"] == [0, 1]


RANKS = """
import sys
from pathlib import Path
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.train import train_run

def stop(point):
    if point["epoch"] == int(sys.argv[4]):
        raise KeyboardInterrupt

folder = Path(__file__).parent
config = RunConfig(model=f"{folder}/dropping.py:build", method="random", epochs=3, train_size=301, batch_size=43)
try:
    row = train_run(config, checkpoint=folder / "checkpoints" / sys.argv[5], checkpoint_seconds=0, on_epoch=stop)
except KeyboardInterrupt:
    sys.exit()
(folder / sys.argv[5]).write_text(repr(row["curve"]["mean_loss"]))
"""


@pytest.mark.slow
def test_a_run_on_two_processes_resumes_with_what_each_draws(tmp_path: Path) -> None:
    """Both took the generators of the first, though the last batch is odd."""
    (tmp_path / "dropping.py").write_text(
        "from torch import nn\n"
        "def build(shape, classes): return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, classes))\n"
    )
    (tmp_path / "main.py").write_text(RANKS)
    for last, name in (("-1", "whole"), ("1", "resumed"), ("-1", "resumed")):
        run_ranks(tmp_path / "main.py", 2, tmp_path, last, name)
    assert (tmp_path / "whole").read_text() == (tmp_path / "resumed").read_text()


def test_every_run_finds_what_a_file_sets_at_its_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set_at_the_top.py").write_text(TASK)
    before = process.settings()
    summary = lab.compare("set_at_the_top.py:train", ["full", "trim"], 2, out="runs", workers=1, quiet=True,
                          epochs=1, metric="rmse")  # fmt: skip
    for row in summary.rows:
        assert (row["value"], row["also"]) == (64, {"sure": 1, "folder": 1, "over": 1})
        assert Path(f"runs/keep/{row['key']}.parquet").is_file()  # `out` is not taken from the function's folder
    assert process.settings() == before


def test_a_file_sets_nothing_for_runs_without_it(tmp_path: Path) -> None:
    (tmp_path / "double.py").write_text("import torch\ntorch.set_default_dtype(torch.float64)\ndef build(a, b): pass\n")
    with process.restored():
        Code.in_file(f"{tmp_path / 'double.py'}:build", "model").load(2)
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == torch.float32
    with process.restored():
        Code.in_file(f"{tmp_path / 'double.py'}:build", "model").load(2)
        assert torch.get_default_dtype() == torch.float64


def test_every_run_finds_the_process_as_the_first_did(tmp_path: Path) -> None:
    """The second run read the first one's environment, rang at its alarm, and could not set a start method again."""
    method, found = multiprocessing.get_start_method(allow_none=True), []
    multiprocessing.set_start_method(None, force=True)  # another test may have set one
    before = process.settings()

    def train(run):
        found.append(process.settings())
        os.environ["SET_BY_A_RUN"] = os.environ.pop("SET_BEFORE")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        signal.setitimer(signal.ITIMER_REAL, 1000)
        multiprocessing.set_start_method("spawn")
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        torch.autocast("cpu").__enter__()
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cudnn.deterministic = True
        torch.set_flush_denormal(True)
        run.trim(torch.ones(4, requires_grad=True)).backward()
        run.trim.step()
        return {"rmse": 1.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SET_BEFORE", "yes")
        for seed in range(2):
            lab.run_once(train, seed=seed, epochs=1, metric="rmse", out=tmp_path)
    assert found[0] == found[1]
    assert process.settings() == before
    layer, x = torch.nn.Linear(1, 1), torch.ones(1, 1)
    for weight in (1.0, 2.0):
        torch.nn.init.constant_(layer.weight, weight - float(layer.bias.detach()))
        with torch.autocast("cpu"):
            assert float(layer(x).detach()) == pytest.approx(weight, rel=0.02), "a region cast the weights anew"
    multiprocessing.set_start_method(method, force=True)


@pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch has the older interface alone")
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_set_by_the_newer_interface_is_restored(name: str) -> None:
    """After which torch refuses to tell it by the older one."""

    def train(run):
        exec(f"{name} = 'tf32'" if "mkldnn" not in name else f"{name} = 'bf16'")
        run.trim(torch.ones(4, requires_grad=True)).backward()
        run.trim.step()
        return {"rmse": 1.0}

    before = process.settings()
    assert lab.run_once(train, epochs=2, metric="rmse", out="/dev/null/never") == 1.0
    assert process.settings() == before
    assert torch.get_float32_matmul_precision() == "highest"
