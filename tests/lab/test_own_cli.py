"""The user's own training functions, images and networks, from the command line as a person types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from batchtrim.lab import records
from batchtrim.lab.execute import local
from commands import batchtrim, mistake

TASK = """
import torch
from helper import value

def train(run):
    print("for people")
    for epoch in range(run.epochs):
        run.trim(torch.rand(8))
        run.log(epoch=epoch, error=value(run))
        run.trim.step()
    return {"error": value(run)}
"""
HELPER = """
def value(run):
    return 0.2 + 0.01 * run.seed - (0.05 + 0.001 * run.seed) * (run.method == "trim")
"""
ARGUMENTS = ["--seeds", "3", "--epochs", "2", "--workers", "1", "--out", "here"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "helper.py").write_text(HELPER)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_task", "helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks in this process: starting one takes longer than all that is asserted, and other tests here do it."""

    def run(queue: Any, recorded: Any, shared: Any, workers: int, retries: int) -> None:
        local.run_here(queue, recorded, shared)

    monkeypatch.setattr(local, "run_in_processes", run)


@pytest.mark.slow
def test_a_task_is_compared_in_a_process_of_its_own() -> None:
    done = batchtrim("compare", "--task", "my_task.py:train", *ARGUMENTS, "--json", "-q")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["groups"][0]["title"] == "my_task.py:train"
    assert "lower error by 5.10 points" in told["verdict"]
    assert [row["environment"]["source"] for row in records.read("here")].count(
        records.read("here")[0]["environment"]["source"]
    ) == 6
    again = batchtrim("compare", "--task", "my_task.py:train", *ARGUMENTS)
    assert "6 of 6 runs are recorded already" in again.stderr
    page = Path("here/report.html").read_text()
    assert "batchtrim compare --task my_task.py:train" in re.sub("</?span[^>]*>", "", page)
    assert '<span class="option">--keep-start</span>' in page  # which no line breaks after its dashes
    report = batchtrim("report", "here", "--json")
    assert json.loads(report.stdout)["verdict"] == told["verdict"]


WRONG = {
    "import sys\n    sys.exit(4)": "the task called exit(4)",
    "return 'done'": "got 'done'",
    "raise ValueError('my own')": "ValueError: my own",
    "run.trim(1)": "expected `losses` to be a tensor, got 1",
}


@pytest.mark.parametrize("body", WRONG)
@pytest.mark.usefixtures("in_this_process")
def test_tasks_that_go_wrong_fail_with_a_line_and_lose_nothing(body: str) -> None:
    goes_wrong(body, WRONG[body])


@pytest.mark.slow  # by default test_workers.py has a worker that dies
@pytest.mark.parametrize("body", [*WRONG, "import os\n    os._exit(3)"])
def test_tasks_that_go_wrong_in_a_worker(body: str) -> None:
    goes_wrong(body, WRONG.get(body, "its worker ended with exit code 3"))


def goes_wrong(body: str, says: str) -> None:
    Path("bad.py").write_text(
        f"{TASK}\ndef bad(run):\n    if run.method == 'full':\n        return train(run)\n    {body}\n"
    )
    done = batchtrim(
        "compare", "--task", "bad.py:bad", "--seeds", "1", "--epochs", "2", "--workers", "1", "--out", "here",
        "--retries", "0",
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert says in done.stderr
    ours = [line for line in done.stderr.splitlines() if "batchtrim/lab" in line.replace(os.sep, "/")]
    assert ours == []
    assert done.stderr.count("Traceback") == ("raise" in body or "run.trim(1)" in body)
    assert [row["config"]["method"] for row in records.read("here") if row["status"] == "finished"] == ["full"]
    assert "1 run failed; repeat the command to retry it" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task", "my_task.py"], "expected `task` to look like my_task.py:train, got 'my_task.py'"),
        (["--task", "my_task:train"], "expected `task` to look like my_task.py:train"),
        (["--task", "my_tusk.py:train"], "Did you mean 'my_task.py'?"),
        (["--task", "my_task.py:trane"], "Did you mean 'train'?"),
        (["--task", "broken.py:train"], "to be Python, got SyntaxError in line 2"),
        (["--task", "raises.py:train"], "raises.py raised when it was loaded"),
        (["--task", "exits.py:train"], "got exit(0) when it was loaded"),
        (["--task", "number.py:train"], "expected number.py:train to be a function, got 3"),
        (["--task", "none.py:train"], "expected none.py:train to take one argument, the run, got train()"),
        (["--task", "my_task.py:train", "--dataset", "digits"], "expected settings of a task"),
        (["--task", "my_task.py:train", "--methods", "full,focal"], "expected a method that a Trimmer drives"),
        (["--task", "my_task.py:train", "--metric", "score"], "Pass --higher-is-better or --lower-is-better"),
        (["--task", "my_task.py:train", "--keep-log"], "expected no --keep-log with --task"),
        (["--task", "my_task.py:train", "--data-dir", "x"], "expected no --data-dir with --task, got 'x'"),
        (["--task", "my_task.py:train", "--checkpoint-seconds", "5"], "expected no --checkpoint-seconds with --task"),
        (["--metric", "rmse"], "expected `metric` beside --task"),
        (["--lower-is-better"], "expected `higher_is_better` beside --task"),
        (["--task", "my_task.py:train", "--metric", "x", "--higher-is-better", "--lower-is-better"], "got both"),
    ],
)
def test_commands_that_cannot_run(words: list[str], says: str) -> None:
    Path("broken.py").write_text("x = 1\ndef train(run:\n")
    Path("raises.py").write_text("import torch\nraise RuntimeError('no data here')\n")
    Path("exits.py").write_text("raise SystemExit(0)\n")
    Path("number.py").write_text("train = 3\n")
    Path("none.py").write_text("def train(): ...\n")
    raised = "raised when it was loaded" in says
    said = mistake("compare", *words, "--out", "here", "--seeds", "1", "--workers", "1", "-q", raised=raised)
    assert says in said
    assert not Path("here/runs.jsonl").exists()
    if "raises.py:train" in words:
        assert "no data here" in said
        assert "importlib" not in said
    else:
        assert len(said.strip().splitlines()) == 1


@pytest.mark.usefixtures("in_this_process")
def test_higher_is_better_turns_the_verdict() -> None:
    Path("f1.py").write_text(TASK.replace('return {"error": value(run)}', 'return {"f1": 1 - value(run)}'))
    done = batchtrim("compare", "--task", "f1.py:train", "--metric", "f1", *ARGUMENTS, "-q")
    assert done.exit_code == 0, done.output
    assert "trim: higher f1 by 0.051" in done.stdout
    page = Path("here/report.html").read_text()
    assert '<div class="verdict lower">' in page, "the colour of a gain"
    assert "Higher f1 is better" in page
    assert "--higher-is-better" in page


@pytest.mark.slow
def test_a_changed_program_is_reported() -> None:
    batchtrim("compare", "--task", "my_task.py:train", *ARGUMENTS, "-q")
    Path("my_task.py").write_text(TASK.replace("rand(8)", "rand(9)"))
    said = mistake("compare", "--task", "my_task.py:train", *ARGUMENTS, "-q")
    assert "expected runs of the present my_task.py:train in here, got those of another version" in said
    done = batchtrim("compare", "--task", "my_task.py:train", "--seeds", "4", *ARGUMENTS[2:], "-q")
    assert "The runs were made by 2 versions of the program" in done.stdout.replace("\n", " ")
    assert "helper.py" not in done.stdout
    Path("helper.py").write_text(HELPER.replace("0.05", "0.06"))
    done = batchtrim("compare", "--task", "my_task.py:train", "--seeds", "5", *ARGUMENTS[2:], "-q")
    assert "The runs were made by 2 versions of helper.py." in done.stdout.replace("\n", " ")
    assert list(records.read("here")[0]["environment"]["helpers"]) == ["helper.py"]


def test_a_task_does_not_run_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "expected --task in one process" in mistake("compare", "--task", "my_task.py:train", *ARGUMENTS)


@pytest.mark.usefixtures("in_this_process")
def test_train_and_sweep_take_a_task() -> None:
    done = batchtrim("train", "--task", "my_task.py:train", "--epochs", "2", "--out", "here", "-q")
    assert done.exit_code == 0, done.output
    assert [row["config"]["method"] for row in records.read("here")] == ["trim"]
    done = batchtrim("sweep", "--task", "my_task.py:train", "--methods", "full,trim", "--keep-end", "0.2,0.5",
                     "--schedule", "linear", "--seeds", "1", "--epochs", "2", "--workers", "1", "--out", "there",
                     "-q")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(records.read("there")) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_task_on_a_ray_cluster(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from batchtrim.lab import compare

    def inside(run: object) -> dict[str, float]:
        run.trim(__import__("torch").rand(4))  # type: ignore[attr-defined]
        run.trim.step()  # type: ignore[attr-defined]
        return {"error": 0.25}

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for task, out in ((f"{tmp_path / 'my_task.py'}:train", "file"), (inside, "closure")):
            found = compare(task, ["full", "trim"], 2, epochs=1 if out == "closure" else 2, out=out, quiet=True,
                            ray=cluster.address)  # type: ignore[arg-type]  # fmt: skip
            assert (found.runs, found.failed) == (4, 0)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_kill_9_loses_no_finished_run(tmp_path: Path) -> None:
    Path("slow.py").write_text(TASK.replace("import torch", "import time, torch").replace(
        'print("for people")', "time.sleep(0.3)"))  # fmt: skip
    words = ["compare", "--task", "slow.py:train", "--seeds", "4", "--epochs", "1", "--workers", "1", "--out", "here"]
    command = [sys.executable, "-m", "batchtrim.lab.cli", *words, "-q", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    lines, end = Path("here/runs.jsonl"), time.monotonic() + 120
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {row["key"]: row for row in records.read("here")}
    assert 2 <= len(before) < 8
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["runs"] == 8
    after = {row["key"]: row for row in records.read("here")}
    assert len(after) == 8
    assert {key: after[key] for key in before} == before


@pytest.mark.usefixtures("in_this_process")
def test_a_page_of_samples_without_classes() -> None:
    Path("logs.py").write_text(
        "import torch\n"
        "def train(run):\n"
        "    log = run.keep_log(8)\n"
        "    for _ in range(run.epochs):\n"
        "        run.trim(torch.arange(8.0)); log.record(run.trim.last, ids=torch.arange(8)); log.end_epoch()\n"
        "        run.trim.step()\n"
        "    run.show(rows=[{'price': i} for i in range(8)])\n"
        "    return {'error': 0.1}\n"
    )
    done = batchtrim("compare", "--task", "logs.py:train", "--methods", "trim", "--seeds", "1", "--epochs", "3",
                     "--workers", "1", "--out", "here", "-q")  # fmt: skip
    assert done.exit_code == 0, done.output
    shown = batchtrim("show", "here")
    assert shown.exit_code == 0, shown.output
    page = next(Path("here/keep").glob("*.html")).read_text()
    assert "price" in page
    assert "Keep rate of each class" not in page
    assert "predicted as another class" not in page
    next(Path("here/keep").glob("*.json")).unlink()
    assert "Let the task say it: run.show(rows=...)" in mistake("show", "here")


def test_images_that_changed_make_other_runs(tmp_path: Path) -> None:
    from PIL import Image

    for kind in range(2):
        (tmp_path / "mine" / str(kind)).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (6, 6), 100 * kind + i).save(tmp_path / "mine" / str(kind) / f"{i}.png")
    words = ["compare", "--dataset", "mine", "--test-split", "0.5", "--seeds", "1", "--epochs", "1", "--workers", "1"]
    first = batchtrim(*words, "--keep-log")
    assert first.exit_code == 0, first.output
    os.utime("mine/0/0.png")  # the same image, written again
    assert "2 of 2 runs are recorded already" in batchtrim(*words).stderr
    assert batchtrim("show", "runs/mine-mlp-adam-1ep").exit_code == 0
    Image.new("L", (6, 6), 50).save(tmp_path / "mine" / "0" / "0.png")
    again = batchtrim(*words)
    assert again.exit_code == 0, again.output
    assert "runs go to runs/mine-mlp-adam-1ep-data_version" in again.stderr
    assert "recorded already" not in again.stderr
    old = records.read("runs/mine-mlp-adam-1ep")[0]["config"]["data_version"]
    assert f"data_version {old} there" in mistake(*words, "--out", "runs/mine-mlp-adam-1ep")
    assert "Images, labels or the split have changed since" in mistake("show", "runs/mine-mlp-adam-1ep")
    Image.new("L", (6, 6), 51).save(tmp_path / "mine" / "0" / "7.png")  # one more
    assert "recorded already" not in batchtrim(*words).stderr


def test_the_users_images_and_network(tmp_path: Path) -> None:
    from PIL import Image

    for kind, value in (("dark", 40), ("light", 200)):
        (tmp_path / "mine, two" / kind).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (10 + i, 12), (value + i, value, i)).save(tmp_path / "mine, two" / kind / f"{i}.png")
    Path("net.py").write_text(
        "from torch import nn\n"
        "def build(shape, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * 64, classes))\n"
        "def wrong(shape, classes):\n    return nn.Flatten()\n"
        "def fails(shape, classes):\n    return undefined\n"
    )
    words = ["compare", "--dataset", "mine, two", "--test-split", "0.25", "--image-size", "8", "--seeds", "2",
             "--epochs", "2", "--workers", "1", "--threads", "1", "--out", "here", "--keep-log"]  # fmt: skip
    done = batchtrim(*words, "--model", "net.py:build")
    assert done.exit_code == 0, done.output
    assert "mine, two: 6 of 24 images set aside for testing" in done.stderr
    assert done.stderr.count("resized to 8 x 8") == 1
    assert "resized to 8 x 8" in Path("here/report.html").read_text()
    assert len({row["environment"]["source"] for row in records.read("here")}) == 1
    shown = batchtrim("show", "here")
    assert shown.exit_code == 0, shown.output
    page = next(Path("here/keep").glob("*.html")).read_text()
    assert ">dark<" in page
    assert ">light<" in page
    words[words.index("here")] = "there"
    said = mistake(*words, "--model", "net.py:wrong", "-q")
    assert "expected net.py:wrong to give logits (B, 2), one per class" in said
    said = mistake(*words, "--model", "net.py:fails", "-q", raised=True)
    assert "NameError" in said
    assert "own_models.py" not in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "net.py:build"], "expected a file net.py for `model`, got nothing there"),
        (["--model", "hf:vitt"], "Did you mean 'hf:vit'?"),
        (["--model", "hf:resnet:depths=1,1"], "with lists in brackets: hf:resnet:depths=[1,1]"),
        (["--model", "hf:vit:hidden_sise=8"], "Did you mean 'hidden_size'?"),
        (["--model", "hf:vit:hidden_size"], "to look like hidden_size=64, got 'hidden_size'"),
        (["--model", "my_task.py:train"], "expected my_task.py:train to take the image shape"),
        (["--test-split", "0.2"], "expected no `test_split` with the data set 'digits', which has its own"),
        (["--skip-broken"], "expected no `skip_broken` with the data set 'digits'"),
        (["--dataset", "no/such/folder"], "which does not exist"),
        (["--dataset", "here/", "--test-split", "1.5"], "expected `test_split` in [0, 1), got 1.5"),
        (["--dataset", "here/", "--image-size", "0"], "expected `image_size` to be at least 1"),
    ],
)  # fmt: skip
def test_own_data_and_networks_that_cannot_be_used(words: list[str], says: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: make test brings it")
    assert says in mistake("compare", *words, "--seeds", "1", "--workers", "1", "-q", "--out", "out")


def test_an_architecture_of_transformers_is_made_from_its_configuration() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: make test brings it")
    import torch

    from batchtrim.lab.task import models

    name = "hf:vit:hidden_size=16:num_hidden_layers=1:num_attention_heads=2:intermediate_size=16:patch_size=4"
    torch.manual_seed(0)
    model = models.build(name, (1, 8, 8), 5)
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 5)
    with pytest.raises(ValueError, match="that divides images of 10 x 10"):
        models.build(name, (1, 10, 10), 5)
    resnet = "hf:ResNetForImageClassification:embedding_size=8:hidden_sizes=[8,16]:depths=[1,1]"
    assert models.build(resnet, (3, 16, 16), 4)(torch.rand(2, 3, 16, 16)).shape == (2, 4)


def test_what_a_network_prints_is_not_in_the_json() -> None:
    Path("net.py").write_text(
        "from torch import nn\nprint('loading')\n"
        "def build(shape, classes):\n    print('building')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    words = ["--methods", "full", "--seeds", "1", "--epochs", "1", "--train-size", "50", "--workers", "1", "--json"]
    done = batchtrim("compare", "--model", "net.py:build", *words)
    assert json.loads(done.stdout)["groups"]
    assert "loading\nbuilding\n" in done.stderr
