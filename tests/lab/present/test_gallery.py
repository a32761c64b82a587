"""The gallery holds what the log says, escapes what it is given, and works in a browser without a network."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

import launch
from batchtrim import Choice, KeepLog, hardest, uniform
from batchtrim.lab import records
from batchtrim.lab.execute import progress, scheduler
from batchtrim.lab.methods.base import RunInfo
from batchtrim.lab.methods.table import METHODS
from batchtrim.lab.present import gallery
from batchtrim.lab.run import loading, loop
from batchtrim.lab.run.config import RunConfig
from browser import find_browser

NASTY = '</script><b>"x"&'


def _log(n, classes, epochs=4, batch=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    log = KeepLog(n, classes=classes, warn=False)  # its samples are all noise
    hard = torch.rand(n, generator=generator) ** 3 * 4
    for epoch in range(epochs):
        for rows in torch.randperm(n, generator=generator).split(batch):
            losses = hard[rows] * (0.8 + 0.4 * torch.rand(len(rows), generator=generator))
            wrong = hard[rows] > 2.5
            predicted = (labels[rows] + wrong) % classes
            outputs = torch.nn.functional.one_hot(predicted, classes) * 4.0
            last = Choice(losses, hardest()(losses, 1 - 0.2 * epoch))
            log.record(last, ids=rows, outputs=outputs, labels=labels[rows])
        log.end_epoch()
    return log, labels, hard


def _data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def _column(data, name, dtype):
    return np.frombuffer(base64.b64decode(data["columns"][name]["data"]), dtype=dtype)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("most", "dtype"), [(32767, "<i2"), (32768, "<i4"), (40000, "<i4")])
def test_classes_beyond_two_bytes_are_kept(most, dtype):
    """Class 40,000 became -25,536."""
    packed = gallery._packed(gallery._classes(torch.tensor([most, -1, 0])))
    assert packed["type"] == {"<i2": "Int16Array", "<i4": "Int32Array"}[dtype]
    assert np.frombuffer(base64.b64decode(packed["data"]), dtype).tolist() == [most, -1, 0]


def test_page_holds_the_log(tmp_path, images):
    log, labels, _ = _log(300, 3)
    samples = gallery.Samples(labels, ["a", "b", NASTY], images=images, title=NASTY)
    page = gallery.write(log, samples, tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert "<b>&quot;" not in page.replace("&lt;b&gt;", "")
    data, table = _data(page), log.table()
    assert data["classes"][2] == NASTY
    ids = _column(data, "id", "<u4")
    assert sorted(ids) == list(range(300))
    torch.testing.assert_close(torch.from_numpy(_column(data, "mean", "<f4").copy()), table["mean"][ids.astype(int)])
    assert (_column(data, "keep", "u1") == (table["keep_rate"][ids.astype(int)] * 200).round().numpy()).all()


def test_each_sample_has_its_own_image(tmp_path):
    log, labels, _ = _log(700, 3)
    images = (torch.arange(700) % 251).to(torch.uint8)[:, None, None, None].expand(700, 1, 8, 8)
    text = gallery.write(log, gallery.Samples(labels, "abc", images=images), tmp_path / "page.html").read_text()
    data = _data(text)
    shown = np.frombuffer(base64.b64decode(data["shown"]["data"]), "<u4")
    ids = _column(data, "id", "<u4")[shown]
    found = []
    for sheet in range(data["sheets"]):
        address = re.search(rf"\.t{sheet}{{background-image:url\(data:image/webp;base64,(.*?)\)}}", text)
        assert address is not None
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address[1]))).convert("L"), dtype=float)
        rows = len(pixels) // 8
        found += pixels.reshape(rows, 8, gallery.SHEET_SIDE, 8).mean((1, 3)).flatten().tolist()
    np.testing.assert_allclose(found[: len(ids)], ids % 251, atol=12)  # lossy


def test_hardest_of_every_class_are_shown():
    log, labels, _ = _log(3000, 3)
    columns = gallery._columns(log, gallery.Samples(labels, "abc", rows=["x"] * 3000))
    shown = set(columns["id"][gallery._shown(columns, 3)].tolist())
    mean = log.table()["mean"]
    for label in range(3):
        members = torch.nonzero(labels == label).flatten()
        hardest_ids = members[mean[members].argsort(descending=True)][: gallery.PER_CLASS]
        assert shown.issuperset(hardest_ids.tolist())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 100, 200)])
def test_sheets_hold_the_images(shape):
    images = torch.zeros(410, *shape, dtype=torch.uint8)
    images[405] = 255
    sheets, thumb = gallery._sheets(images)
    assert len(sheets) == 2
    assert max(thumb["width"], thumb["height"]) <= gallery.THUMB
    sheet = Image.open(io.BytesIO(base64.b64decode(sheets[1].partition(",")[2]))).convert("L")
    found = np.asarray(sheet).reshape(1, thumb["height"], thumb["side"], thumb["width"]).mean((1, 3))[0]
    assert found.argmax() == 5
    assert found[5] > 200


def test_text_and_tables_are_rows(tmp_path):
    log, labels, _ = _log(40, 2)
    rows = [{"age": i, "note": NASTY * 100} if i % 2 else "a plain text" for i in range(40)]
    page = gallery.write(log, gallery.Samples(labels, ["no", "yes"], rows=rows), tmp_path / "page.html")
    data = _data(page.read_text(encoding="utf-8"))
    assert [["", "a plain text"]] in data["rows"]
    assert any(fields[0][0] == "age" and fields[1][1].endswith("…") for fields in data["rows"])


@pytest.mark.parametrize("bad", ["length", "neither", "both", "rows", "classes"])
def test_invalid_samples_are_refused(tmp_path, images, bad):
    log, labels, _ = _log(300, 3)
    samples = {
        "length": gallery.Samples(labels[:9], "abc", images=images),
        "neither": gallery.Samples(labels, "abc"),
        "both": gallery.Samples(labels, "abc", images=images, rows=["x"] * 300),
        "rows": gallery.Samples(labels, "abc", rows=["x"] * 299),
        "classes": gallery.Samples(labels, "ab", images=images),
    }[bad]
    with pytest.raises(
        ValueError, match=r"expected (300 labels|either `images` or `rows`|`rows` of 300|`labels` from 0 to 1)"
    ):
        gallery.write(log, samples, tmp_path / "page.html")


def test_the_old_name_of_the_images_works_with_a_warning(images):
    _, labels, _ = _log(300, 3)
    with pytest.warns(
        DeprecationWarning, match=r"Samples\.pictures is removed in the next release: use images"
    ) as caught:
        samples = gallery.Samples(labels, "abc", pictures=images)
    assert samples.images is images
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"Samples\.pictures"):
        assert samples.pictures is images
    with (
        pytest.warns(DeprecationWarning, match="images"),
        pytest.raises(TypeError, match="`images` alone, got `pictures`"),
    ):
        gallery.Samples(labels, "abc", pictures=images, images=images)


def test_a_log_without_predictions_or_classes_makes_a_page(tmp_path):
    log = KeepLog(5)
    log.record(Choice(torch.rand(4), hardest()(torch.rand(4), 0.5)), ids=torch.arange(4))
    page = gallery.write(
        log, gallery.Samples(torch.zeros(5, dtype=torch.int64), ["a"], rows=list("abcde")), tmp_path / "p"
    )
    text = page.read_text(encoding="utf-8")
    assert "was not recorded" in text
    assert _data(text)["n"] == 4


@pytest.mark.slow
def test_fifty_thousand_images(tmp_path):
    log, labels, _ = _log(50_000, 10, epochs=2, batch=512)
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)  # noise: what compresses worst
    start = time.perf_counter()
    page = gallery.write(log, gallery.Samples(labels, list("abcdefghij"), images=images), tmp_path / "page.html")
    assert time.perf_counter() - start < 60
    assert page.stat().st_size < 20e6


@pytest.fixture
def run_folder(tmp_path):
    """Two tiny runs with their logs, as ``batchtrim compare --keep-log`` leaves them."""
    configs = [
        RunConfig(method=method, epochs=3, train_size=200, model="mlp").resolved() for method in ("trim", "full")
    ]
    shared = scheduler.SharedOptions(tmp_path, keep_log=True)
    scheduler.run_all(configs, shared, progress.Quiet())
    return tmp_path, configs


def test_build_shows_the_run_that_trimmed(run_folder):
    folder, (trim, full) = run_folder
    page = gallery.build(folder)
    assert page == folder / "keep" / f"{trim.key}.html"
    data, log = _data(page.read_text(encoding="utf-8")), KeepLog.from_parquet(folder / "keep" / f"{trim.key}.parquet")
    assert data["n"] == 200
    assert int(log.table()["seen"].sum()) == 600
    assert [line["seen"] for line in log.history] == [200, 200, 200]
    assert int(log.table()["kept"].sum()) == next(
        row["samples_backward"] for row in records.read(folder) if row["key"] == trim.key
    )
    assert gallery.build(folder, folder / "other.html", key=full.key[:5]) == folder / "other.html"
    with pytest.raises(ValueError, match="expected a run with a keep log, got 'zzz'"):
        gallery.build(folder, key="zzz")


def test_build_without_a_log_says_how_to_get_one(tmp_path):
    (tmp_path / "runs.jsonl").write_text("")
    with pytest.raises(ValueError, match="--keep-log"):
        gallery.build(tmp_path)


def test_a_resumed_run_keeps_its_log():
    config = RunConfig(method="trim", epochs=4, train_size=200, model="mlp").resolved()
    images = loading.load_images(config)
    whole = loop.Training(config, images, log=KeepLog(200, classes=10))
    for _ in range(4):
        whole.train_epoch()
    first = loop.Training(config, images, log=KeepLog(200, classes=10))
    first.train_epoch()
    resumed = loop.Training(config, images, log=KeepLog(200, classes=10))
    resumed.load_state_dict(first.state_dict())
    for _ in range(3):
        resumed.train_epoch()
    assert resumed.log.history == whole.log.history
    for name, column in whole.log.table().items():
        assert column.equal(resumed.log.table()[name]), name
    with pytest.raises(ValueError, match="with the same --keep-log"):
        loop.Training(config, images).load_state_dict(first.state_dict())


def _command(folder, *words):
    return [
        "batchtrim.lab.cli", "train", "--out", str(folder), "--keep-log", "--checkpoint-seconds", "0",
        "--threads", "1", "--quiet", *words,
    ]  # fmt: skip


def _only_log(folder):
    (path,) = (folder / "keep").glob("*.parquet")
    return path


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_writes_the_same_log(tmp_path):
    words = ("--epochs", "60", "--train-size", "600")
    go = [sys.executable, "-m", *_command(tmp_path / "killed", *words)]
    process = subprocess.Popen(go)
    begun = time.monotonic()
    while not list((tmp_path / "killed").glob("checkpoints/*.pt")) and time.monotonic() - begun < 100:
        time.sleep(0.005)
    process.kill()
    process.wait()
    (checkpoint,) = (tmp_path / "killed").glob("checkpoints/*.pt")
    assert 0 < len(torch.load(checkpoint)["log"]["history"]) < 60
    assert not (tmp_path / "killed" / "keep").exists()
    subprocess.run(go, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, "-m", *_command(tmp_path / "whole", *words)], check=True, stdout=subprocess.DEVNULL)
    resumed, whole = (parquet.read_table(_only_log(tmp_path / name)) for name in ("killed", "whole"))
    assert resumed.schema.equals(whole.schema, check_metadata=True)
    assert resumed.to_pandas().equals(whole.to_pandas())


@pytest.mark.slow
def test_two_processes_write_one_log_of_all_samples(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += [launch.__file__, "-m"]
    command = [*torchrun, *_command(tmp_path, "--epochs", "3", "--batch-size", "64")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    table = KeepLog.from_parquet(_only_log(tmp_path)).table()
    assert table["seen"].unique().tolist() == [3]
    assert int(table["kept"].sum()) == records.read(tmp_path)[0]["samples_backward"]


def _browse(page, address, profile):
    done = subprocess.run(
        [
            find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom",
            page.as_uri() + address,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_page_works_in_a_browser(tmp_path, images):
    log, labels, hard = _log(300, 3)
    page = gallery.write(log, gallery.Samples(labels, ["ant", "bee", "cow"], images=images), tmp_path / "page.html")
    dom = _browse(page, "", tmp_path / "profile")
    assert 'data-sheets="1"' in dom, "the sprite sheet did not decode"
    assert dom.count('class="thumb t0"') == 24, "eight of each class"
    mean = log.table()["mean"]
    for label, name in enumerate(("ant", "bee", "cow")):
        of_class = re.search(rf"<h3>{name}<button>all 100</button></h3>(.*?)(<h3>|</div><button)", dom, re.DOTALL)
        assert of_class is not None
        members = torch.nonzero(labels == label).flatten()
        hardest_ids = members[mean[members].argsort(descending=True)][:8]
        assert [int(i) for i in re.findall(r'data-id="(\d+)"', of_class[1])] == hardest_ids.tolist()
    wrong = int(((labels == 0) & (hard > 2.5)).sum())
    assert f"<span>ant → bee</span><b>{wrong}<small> of {wrong}</small></b>" in dom
    mixed = _browse(page, "#label=&sort=spread", tmp_path / "profile")
    assert mixed.count('class="thumb t0"') == 48
    assert "300 samples match" in mixed
    filtered = _browse(page, "#label=1&wrong=1", tmp_path / "profile")
    expected = int(((labels == 1) & (hard > 2.5)).sum())
    assert expected > 3
    assert f"{expected} samples match" in filtered
    shown = re.findall(r'<article class="sample" data-id="(\d+)"', filtered)
    assert len(shown) == min(48, expected)
    assert all(int(i) % 3 == 1 for i in shown)


@pytest.mark.slow
def test_rows_work_in_a_browser(tmp_path):
    log, labels, _ = _log(90, 3)
    rows = [{"text": f"sample {i}", "html": NASTY} for i in range(90)]
    page = gallery.write(log, gallery.Samples(labels, ["ant", "bee", "cow"], rows=rows), tmp_path / "page.html")
    dom = _browse(page, "", tmp_path / "profile")
    assert dom.count("<article") == 24
    assert "&lt;/script&gt;&lt;b&gt;" in dom


def test_the_methods_that_draw_are_known():
    """data_dropout chooses by difficulty, and its two controls draw: it was the other way round."""
    drawing = set()
    for name, row in METHODS.items():
        rule = row.build(RunInfo(300, 10, 4, 64, 0), row.check_params({})).trim.rule
        if isinstance(getattr(rule, "rule", rule), uniform):
            drawing.add(name)
    assert drawing == set(gallery.DRAWN)
