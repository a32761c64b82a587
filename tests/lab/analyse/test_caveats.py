"""Caveats beside a verdict: missing pairs, seeds that were not used, programs that changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from batchtrim.lab.analyse import comparison, csv_table
from batchtrim.lab.analyse.caveats import Caveat, Kind, caveats
from batchtrim.lab.present.caveat_texts import caveat_texts
from batchtrim.lab.present.wording import group_verdict

Row = dict[str, Any]
MakeRow = Callable[..., Row]


def runs(make_row: MakeRow, seeds: dict[str, list[int]], **more: Any) -> list[Row]:
    return [
        {**make_row(method, seed, 0.2 + 0.01 * seed - 0.02 * (method == "trim") + 0.001 * (seed % 3)), **more}
        for method, each in seeds.items()
        for seed in each
    ]


def found(rows: list[Row]) -> tuple[Caveat, ...]:
    (group,) = comparison.summarize(rows).groups
    assert len(caveat_texts(group)) == len(caveats(group))
    return caveats(group)


def test_complete_pairs_have_no_caveat(make_row: MakeRow) -> None:
    assert found(runs(make_row, {"full": [0, 1, 2], "trim": [0, 1, 2]})) == ()


def test_missing_pairs_on_either_side(make_row: MakeRow) -> None:
    rows = runs(make_row, {"full": [0, 1, 2, 3], "trim": [1, 2, 3, 4, 5]})
    assert found(rows) == (
        Caveat(Kind.ARM_LACKS, "trim", (0,), 3),
        Caveat(Kind.BASELINE_LACKS, "trim", (4, 5), 3),
    )
    (group,) = comparison.summarize(rows).groups
    assert group.arms[1].paired is not None
    assert group.arms[1].paired.seeds == (1, 2, 3)
    assert caveat_texts(group)[0] == "trim has no finished run with seed 0: compared on the 3 pairs that are there."


def test_a_failed_run_is_a_missing_pair_and_a_diverged_one_is_not(make_row: MakeRow) -> None:
    rows = runs(make_row, {"full": [0, 1, 2], "trim": [0]})
    rows += [make_row("trim", 1, None, status="failed"), make_row("trim", 2, None)]
    assert found(rows) == (Caveat(Kind.FEW, "", (), 1), Caveat(Kind.ARM_LACKS, "trim", (1,), 1))


def test_a_lack_of_pairs_names_the_arm_that_lacks_them(make_row: MakeRow) -> None:
    """Beside a method with a verdict it read "2 seeds are too few", of three seeds."""
    rows = [*runs(make_row, {"full": [0, 1, 2], "random": [0, 1, 2], "trim": [0, 1]}), make_row("trim", 2, None)]
    assert found(rows) == (Caveat(Kind.FEW, "trim", (), 2),)
    (group,) = comparison.summarize(rows).groups
    assert caveat_texts(group)[0].startswith("trim: 2 pairs are too few: no verdict is given below 3")
    assert group_verdict(group) == "no difference seen: random; no verdict: trim (some diverged)"
    (group,) = comparison.summarize(runs(make_row, {"full": [0, 1, 2], "trim": [3, 4, 5]})).groups
    assert (
        caveat_texts(group)[0] == "trim has no finished run with seeds 0, 1, 2: not compared, since no pair is there."
    )


def test_options_are_named_only_for_runs_that_an_option_makes(make_row: MakeRow) -> None:
    table = [{"method": method, "seed": 0, "accuracy": 0.5} for method in ("full", "trim")]
    for rows, told in (
        (runs(make_row, {"full": [0], "trim": [0]}), True),
        (csv_table.to_records(table, "mine"), False),
    ):
        (group,) = comparison.summarize(rows).groups
        assert ("--seeds 5" in caveat_texts(group)[0]) == told


def test_one_seed_for_several(make_row: MakeRow) -> None:
    rows = [{**row, "torch_seed": 42} for row in runs(make_row, {"full": [0, 1, 2], "trim": [0, 1, 2]})]
    assert found(rows) == (
        Caveat(Kind.ONE_SEED, "full", (0, 1, 2), 42),
        Caveat(Kind.ONE_SEED, "trim", (0, 1, 2), 42),
    )
    (group,) = comparison.summarize(rows).groups
    assert "full: runs with seeds 0, 1, 2 were all seeded with 42 by the task." in caveat_texts(group)[0]
    own = [{**row, "torch_seed": 1000 + row["config"]["seed"]} for row in rows]
    assert found(own) == ()


def test_other_seeds_than_the_baseline_s(make_row: MakeRow) -> None:
    """A task that calls torch.seed() was reported as paired."""
    rows = [{**row, "torch_seed": 1000 + n} for n, row in enumerate(runs(make_row, {"full": [0, 1], "trim": [0, 1]}))]
    few = Caveat(Kind.FEW, "", (), 2)
    assert found(rows) == (few, Caveat(Kind.UNPAIRED, "trim", (0, 1), 0))
    rows[2]["torch_seed"] = 1000
    assert found(rows) == (few, Caveat(Kind.UNPAIRED, "trim", (1,), 0))


@pytest.mark.parametrize("task", [True, False])
def test_the_same_value_on_every_seed(make_row: MakeRow, task: bool) -> None:
    more = {"task": "my_task.py:train"} if task else {}
    rows = [make_row(method, seed, 0.25, **more) for method in ("full", "trim") for seed in range(3)]
    expected = tuple(Caveat(Kind.ALIKE, method, (0, 1, 2), 0) for method in ("full", "trim"))
    assert found(rows) == (expected if task else ())


def test_one_method_by_two_names(make_row: MakeRow) -> None:
    """Its p was doubled, and that of all others raised, without a word."""
    rows = [*runs(make_row, {"full": [0, 1, 2]}), *runs(make_row, {"trim": [0, 1, 2]}, seconds=7.0)]
    twin = [{**row, "config": {**row["config"], "keep_start": 0.7}, "key": f"twin{n}", "seconds": 9.0}
            for n, row in enumerate(rows[3:])]  # fmt: skip
    assert found([*rows, *twin]) == (Caveat(Kind.TWICE, "trim (keep_start 1)", (0, 1, 2), 0, "trim (keep_start 0.7)"),)
    (group,) = comparison.summarize([*rows, *twin]).groups
    assert caveat_texts(group)[0].startswith("trim (keep_start 1) and trim (keep_start 0.7) gave the same value on")
    for change in ({"test_error": 0.19}, {"curve": {}}):
        assert found([*rows, {**twin[0], **change}, *twin[1:]]) == ()
    assert found([*rows, *({**row, "config": {**row["config"], "engine": "two_pass"}} for row in twin)]) == ()


def test_notes_of_runs_are_listed_by_arm_or_once(make_row: MakeRow) -> None:
    rows = runs(make_row, {"full": [0, 1, 2], "trim": [0, 1, 2]})
    data = [{**row, "notes": ["5 images are on both sides"]} for row in rows]
    assert found(data) == (Caveat(Kind.NOTED, "", (), 0, "5 images are on both sides"),)
    some = [{**row, "notes": ["it was late"]} if row["config"]["method"] == "trim" else row for row in rows]
    assert found(some) == (Caveat(Kind.NOTED, "trim", (0, 1, 2), 0, "it was late"),)
    (group,) = comparison.summarize(some).groups
    assert caveat_texts(group) == ["trim, seeds 0, 1, 2: it was late."]


def test_several_versions_of_the_program(make_row: MakeRow) -> None:
    rows = runs(make_row, {"full": [0, 1, 2], "trim": [0, 1, 2]})
    for number, row in enumerate(rows):
        row["environment"] = {**row["environment"], "source": "abc" if number < 4 else "def"}
    assert found(rows) == (Caveat(Kind.SOURCES, "", (), 2),)


@pytest.mark.parametrize(("task", "kept", "said"), [(True, 600, True), (False, 600, False), (True, 1000, False)])
def test_a_task_that_ignores_the_trimmed_loss(make_row: MakeRow, task: bool, kept: int, said: bool) -> None:
    """A share of 60 % was reported of plain training."""
    more = {"task": "my_task.py:train"} if task else {}
    rows = [make_row(method, seed, 0.2 + 0.01 * seed, **more) for method in ("full", "trim") for seed in range(3)]
    for row in rows:
        row |= {"samples_forward": 1000, "samples_backward": kept if row["config"]["method"] == "trim" else 1000}
    assert found(rows) == ((Caveat(Kind.UNUSED, "trim", (0, 1, 2), 0),) if said else ())
    rows[-1]["test_error"] += 1e-9
    assert found(rows) == ()
