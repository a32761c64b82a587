"""The lab on what people met elsewhere: work that is lost after a failure, numbers at another's name, damaged records.

Each test names the public report whose kind it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("filelock")

from batchtrim.lab import records
from batchtrim.lab.analyse import claims, comparison, naming
from batchtrim.lab.execute import grid, progress, scheduler
from batchtrim.lab.present import readme_table, results, wording
from batchtrim.lab.run import checkpoint, loop, train
from batchtrim.lab.run.config import RunConfig
from lab.conftest import _make_row

TINY = {"methods": ["trim"], "seeds": 1, "epochs": 4, "train_size": 200, "threads": 1}
CLAIM = 'effect = 0.5\n[[claim]]\ntext = "It helps."\nmethod = "trim"\nagainst = "full"\nsays = "lower"\n'


# --- a failed run goes on from its checkpoint ---------------------------------------------------------------------
# atomantic/PortOS pull 1251: an interrupted training run was a total loss, though it had saved checkpoints


def fail_at(epoch: int, error: BaseException) -> Callable[[Any], Any]:
    advance = loop.Training.advance

    def broken(training: Any) -> Any:
        if training.epoch == epoch:
            raise error
        return advance(training)

    return broken


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("a kernel failed"), ValueError("bad input")])
def test_a_failed_run_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    shared = scheduler.SharedOptions(tmp_path, checkpoint_seconds=0.0)
    (config,) = grid.expand(TINY)
    with monkeypatch.context() as patched:
        patched.setattr(loop.Training, "advance", fail_at(3, error))
        (failed,) = scheduler.run_all([config], shared, progress.Quiet())
    assert failed["status"] == "failed"
    assert shared.checkpoint(config).exists()

    class Counting(progress.Quiet):
        epochs = 0

        def epoch(self, config: RunConfig, point: dict[str, Any]) -> None:
            self.epochs += 1

    watcher = Counting()
    assert scheduler.run_all([config], shared, watcher) == []
    assert watcher.epochs == 1
    assert not shared.checkpoint(config).exists()
    (row,) = records.read(tmp_path)
    assert row["test_error"] == train.train_run(config)["test_error"]


def test_a_damaged_checkpoint_is_removed_once_and_the_run_begins_again(tmp_path: Path) -> None:
    shared = scheduler.SharedOptions(tmp_path)
    (config,) = grid.expand(TINY)
    shared.checkpoint(config).parent.mkdir()
    shared.checkpoint(config).write_bytes(b"PK damaged")
    (failed,) = scheduler.run_all([config], shared, progress.Quiet())
    assert "DamagedCheckpoint" in failed["error"]
    assert scheduler.run_all([config], shared, progress.Quiet()) == []


@pytest.mark.parametrize("error", [PermissionError("not now"), MemoryError("no room"), torch.OutOfMemoryError("full")])
def test_a_checkpoint_that_cannot_be_read_now_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    shared = scheduler.SharedOptions(tmp_path)
    (config,) = grid.expand(TINY)
    checkpoint.save({"key": config.key}, shared.checkpoint(config))

    def refuses(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", refuses)
    (failed,) = scheduler.run_all([config], shared, progress.Quiet())
    assert type(error).__name__ in failed["error"]
    assert shared.checkpoint(config).exists()


# --- what a process left that died while it wrote -------------------------------------------------------------------
# pgbackrest/pgbackrest issue 144: resuming fails where temporary files are left


@pytest.mark.parametrize("name", ["abc.part", "abc.0123456789abcdef.part"])
def test_a_leftover_part_does_not_hold_the_folder(tmp_path: Path, name: str) -> None:
    kept = records.Records(tmp_path)
    kept.settle([{"epochs": 1}])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).write_bytes(b"half a")
    kept.settle([{"epochs": 2}])
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_leftover_part_of_a_run_goes_when_the_run_is_done_again(tmp_path: Path) -> None:
    (config,) = grid.expand(TINY)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f"{config.key}.0f.part").write_bytes(b"half a")
    scheduler.run_all([config], scheduler.SharedOptions(tmp_path), progress.Quiet())
    assert not list((tmp_path / "checkpoints").iterdir())


# --- no number at another arm's name --------------------------------------------------------------------------------
# mozilla/translations issue 408: charts go by display names that are not unique, so runs are not shown properly


def record(folder: Path, arms: list[tuple[str, dict[str, Any], float]], text: str = CLAIM) -> Path:
    """Runs of each arm: its method, its settings, and what it adds to the error of a seed."""
    folder.mkdir(exist_ok=True)
    rows = [
        _make_row(method, seed, 0.2 + seed / 100 + added + seed * seed / 10_000 * (added != 0), **settings)
        for method, settings, added in arms
        for seed in range(5)
    ]
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "claims.toml").write_text(text)
    return folder


TWO_ARMS = [("full", {}, 0.0), ("trim", {"keep_end": 0.5}, -0.05), ("trim", {"keep_end": 0.2}, 0.1)]


@pytest.mark.parametrize("arms", [TWO_ARMS, TWO_ARMS[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize("extra", ["", 'schedule = "linear"\n'])
def test_a_claim_on_several_arms_is_refused_and_lists_them(tmp_path: Path, arms: Any, extra: str) -> None:
    with pytest.raises(
        ValueError, match=r"to name one arm of 'trim', got 2 .*keep_end 0\.\d.*keep_end 0\.\d.*keep_end ="
    ):
        claims.read(record(tmp_path / "r", arms, CLAIM + extra))


@pytest.mark.parametrize("arms", [TWO_ARMS, TWO_ARMS[::-1]], ids=["in order", "reversed"])
def test_tables_by_method_show_every_arm_with_its_settings(tmp_path: Path, arms: Any) -> None:
    """They had the number of whichever line came last, under the method's name."""
    read = [claims.read(record(tmp_path / "r", arms, f"{CLAIM}keep_end = 0.2\n"))]
    (row,) = [line for line in results.page(read).splitlines() if line.startswith("| digits")]
    (cell,) = [each for each in row.split(" | ") if "keep\\_end" in each]
    first, second = cell.split("<br>")
    assert {first.partition(": ")[0], second.partition(": ")[0]} == {"keep\\_end 0.5", "keep\\_end 0.2"}
    assert all(("0.5:" in each) == ("4." in each.partition("(")[0]) for each in (first, second))
    _, _, row = readme_table.table(read).splitlines()
    assert {each.partition(":")[0] for each in row.split(" | ")[-3].split("<br>")} == {
        "keep\\_end 0.5",
        "keep\\_end 0.2",
    }


@pytest.mark.parametrize(("keep_end", "mean"), [(0.5, -0.05), (0.2, 0.1)])
def test_a_claim_names_any_setting(tmp_path: Path, keep_end: float, mean: float) -> None:
    for arms in (TWO_ARMS, TWO_ARMS[::-1]):
        (found,) = claims.read(record(tmp_path / "r", arms, f"{CLAIM}keep_end = {keep_end}\n")).findings
        assert found.difference.mean == pytest.approx(mean, abs=0.001)


def test_a_claim_names_the_other_side_s_setting_a_parameter_and_a_group(tmp_path: Path) -> None:
    text = CLAIM.replace('against = "full"', 'against = "trim"\nkeep_end = 0.5\nagainst_keep_end = 0.2')
    (found,) = claims.read(record(tmp_path / "r", TWO_ARMS, text)).findings
    assert found.difference.mean == pytest.approx(-0.15, abs=0.001)
    arms = [("full", {}, 0.0)] + [("small_loss", {"method_params": {"noise_rate": rate}}, rate) for rate in (0.1, 0.2)]
    text = CLAIM.replace('"trim"', '"small_loss"\nnoise_rate = 0.2')
    (found,) = claims.read(record(tmp_path / "s", arms, text)).findings
    assert found.difference.mean == pytest.approx(0.2, abs=0.001)
    arms = [(method, {"optimizer": name}, add) for name, add in (("adam", 0.1), ("sgd", 0.2)) for method, add in
            (("full", 0.0), ("trim", add))]  # fmt: skip
    (found,) = claims.read(record(tmp_path / "t", arms, CLAIM + 'optimizer = "sgd"\n')).findings
    assert found.difference.mean == pytest.approx(0.2, abs=0.001)


@pytest.mark.parametrize("values", [(0.3333333, 1 / 3), (0.2, 0.2 + 1e-9), (1e-7, 1.00000001e-7)])
def test_arms_whose_labels_print_alike_stay_apart(values: tuple[float, float]) -> None:
    rows = [_make_row("full", seed, 0.2 + seed / 100) for seed in range(5)]
    for value, added in zip(values, (0.05, 0.1), strict=True):
        rows += [_make_row("trim", seed, 0.2 + seed / 100 + added, keep_end=value) for seed in range(5)]
    (group,) = comparison.summarize(rows).groups
    _, first, second = group.arms
    assert first.label != second.label
    assert first.paired is not None
    assert second.paired is not None
    assert first.paired.moments.mean == pytest.approx(0.05)
    assert second.paired.moments.mean == pytest.approx(0.1)
    assert all(repr(value) in wording.command(group) for value in values)


@pytest.mark.parametrize("pair", [(1, "1"), (None, "None"), (1, 1.0)])
def test_parameters_that_print_alike_stay_apart(pair: tuple[Any, Any]) -> None:
    arms = [{"method": "m", "method_params": {"a": value}} for value in pair]
    assert len(set(naming.labels(arms).values())) == len({naming.key(arm) for arm in arms})


def test_the_command_again_names_every_arm_s_parameters() -> None:
    rows = [_make_row("full", 0, 0.1), _make_row("small_loss", 0, 0.1, method_params={"noise_rate": 0.1})]
    rows.append(_make_row("small_loss", 0, 0.1, method_params={"noise_rate": 0.2}))
    (group,) = comparison.summarize(rows).groups
    assert "--param small_loss.noise_rate=0.1,0.2" in wording.command(group)


def test_the_baseline_is_the_same_arm_in_any_order_of_lines() -> None:
    rows = [_make_row("trim", seed, 0.1 + keep, keep_end=keep) for keep in (0.5, 0.2) for seed in range(3)]
    found = [comparison.summarize(each, "trim").groups[0].baseline for each in (rows, rows[::-1])]
    assert found[0] == found[1]


# --- damaged records are named by file and line ---------------------------------------------------------------------
# openai/evals pull 259: the error said line 1 and meant line 143; datalad/datalad issue 4360: no newline at the end


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"test_error": None}, "`test_error` a number"),
        ({"test_error": "0.1"}, "`test_error` a number"),
        ({"test_error": 12.5}, "`test_error` a number"),
        ({"samples_backward": None}, "`samples_backward` a number"),
        ({"status": "done"}, "`status` one of"),
        ({"seed": None}, "`config.seed` a whole number"),
        ({"seed": "1"}, "`config.seed` a whole number"),
        ({"curve": 3}, "`curve` a table"),
    ],
)
def test_a_row_that_no_comparison_can_read_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    rows = [_make_row("full", seed, 0.1) for seed in range(3)]
    for name, value in change.items():
        (rows[1]["config"] if name == "seed" else rows[1])[name] = value
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(records.ReplaceRecords, match=rf"{named}.* in .*runs\.jsonl, line 2\."):
        records.read_results(tmp_path)
    with pytest.raises(records.ReplaceRecords, match=rf"{named}.* in run {rows[1]['key']}\."):
        comparison.summarize(rows)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', "\x00"])
def test_a_corrupt_grid_is_named(tmp_path: Path, text: str) -> None:
    kept = records.Records(tmp_path)
    kept.append(_make_row("full", 0, 0.1))
    (tmp_path / "grid.json").write_text(text)
    with pytest.raises(records.ReplaceRecords, match=r"settings of the runs in .*grid\.json"):
        kept.settle([{"epochs": 1}])


def test_a_last_line_without_newline_counts_and_stays(tmp_path: Path) -> None:
    first, second = (json.dumps(_make_row("full", seed, 0.1)) for seed in (0, 1))
    (tmp_path / "runs.jsonl").write_text(f"{first}\n{second}")
    assert [row["config"]["seed"] for row in records.read_results(tmp_path)] == [0, 1]
    kept = records.Records(tmp_path)
    assert len(kept.rows()) == 2
    kept.append(_make_row("full", 2, 0.1))
    assert [row["config"]["seed"] for row in records.read(tmp_path)] == [0, 1, 2]
    assert len(kept.rows()) == 3


def test_a_partial_run_is_reported_and_set_aside(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text(json.dumps(_make_row("full", 0, 0.1)) + '\n{"schema": 1, "ke')
    assert records.torn(tmp_path) == f"{tmp_path / 'runs.jsonl'}, line 2"
    records.Records(tmp_path).append(_make_row("full", 1, 0.1))
    assert (tmp_path / "runs.torn").read_text() == '{"schema": 1, "ke\n'
    assert records.torn(tmp_path) == ""


@pytest.mark.parametrize("pairs", [1, 2, 3, 4])
def test_few_pairs_get_a_verdict_or_the_number_that_is_needed(pairs: int) -> None:
    rows = [_make_row("full", seed, 0.2 + seed / 100) for seed in range(pairs)]
    rows += [_make_row("trim", seed, 0.1 + seed / 100 + seed * seed / 1000) for seed in range(pairs)]
    (group,) = comparison.summarize(rows).groups
    said = wording.verdict(group.arms[1], group.reference)
    assert ("3 or more are needed" in said) == (pairs < 3)
    assert ("error by" in said or "no difference seen" in said) == (pairs >= 3)
