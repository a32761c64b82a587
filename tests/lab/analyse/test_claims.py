"""Claims judged from their runs: supported, not supported, or not decidable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchtrim.lab.analyse import claims, inference
from batchtrim.lab.analyse.claims import Status
from batchtrim.lab.present import results

ROOT = Path(__file__).parents[3]
CLAIMS = """
title = "A record"
effect = 0.5
[[claim]]
text = "Trimming helps."
method = ["trim", "random"]
against = "full"
says = "lower"
"""


def write(folder: Path, errors: dict[str, Sequence[float]], text: str = CLAIMS, **config: Any) -> Path:
    """A record folder in which each method has these test errors, in percent, by seed."""
    folder.mkdir(exist_ok=True)
    lines = []
    for name, values in errors.items():
        method, _, engine = name.partition("/")
        for seed, value in enumerate(values):
            key = hashlib.sha256(f"{name}{seed}{config}".encode()).hexdigest()[:12]
            run = {
                "schema": 1, "key": key, "status": "finished", "test_error": value / 100,
                "config": {"dataset": "d", "method": method, "seed": seed, "engine": engine or "exact", **config},
                "seconds": 1.0, "seconds_eval": 0.1, "samples_forward": 10, "samples_backward": 10, "steps": 1,
            }  # fmt: skip
            lines.append(json.dumps(run) + "\n")
    with (folder / "runs.jsonl").open("a") as file:
        file.writelines(lines)
    (folder / "claims.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("says", "differences", "status"),
    [
        ("lower", [-1.0, -1.2, -0.9, -1.1, -1.0], Status.SUPPORTED),
        ("higher", [-1.0, -1.2, -0.9, -1.1, -1.0], Status.NOT_SUPPORTED),
        ("same", [-1.0, -1.2, -0.9, -1.1, -1.0], Status.NOT_SUPPORTED),
        ("lower", [0.1, -0.1, 0.0, 0.1, -0.1], Status.NOT_SUPPORTED),  # half a point is ruled out
        ("higher", [0.1, -0.1, 0.0, 0.1, -0.1], Status.NOT_SUPPORTED),
        ("same", [0.1, -0.1, 0.0, 0.1, -0.1], Status.SUPPORTED),
        ("lower", [2.0, -3.0, 1.0, -2.0, 1.0], Status.NOT_DECIDABLE),
        ("higher", [2.0, -3.0, 1.0, -2.0, 1.0], Status.NOT_DECIDABLE),
        ("same", [2.0, -3.0, 1.0, -2.0, 1.0], Status.NOT_DECIDABLE),
        ("higher", [1.0, 1.2, 0.9, 1.1, 1.0], Status.SUPPORTED),
        ("lower", [-1.0, -1.1], Status.NOT_DECIDABLE),  # two pairs tell nothing
    ],
)
def test_a_claim_is_judged_by_its_pairs(says: str, differences: list[float], status: str) -> None:
    values = [value / 100 for value in differences]
    assert claims.judge(says, inference.moments(values), inference.paired_t(values), effect=0.005) == status


@pytest.mark.parametrize(
    ("differences", "status"),
    [
        ([0.1, -0.1, 0.0, 0.1, -0.1], Status.SUPPORTED),
        ([-1.0, -1.2, -0.9, -1.1, -1.0], Status.SUPPORTED),  # better is not worse
        ([0.2, 0.3, 0.2, 0.25, 0.2], Status.SUPPORTED),  # worse, but by less than the margin
        ([0.6, 0.7, 0.6, 0.65, 0.6], Status.NOT_SUPPORTED),
        ([0.4, 0.7, 0.3, 0.6, 0.5], Status.NOT_DECIDABLE),
        ([2.0, -3.0, 1.0, -2.0, 1.0], Status.NOT_DECIDABLE),
        ([0.0, 0.0, 0.0], Status.SUPPORTED),  # the same on every seed
        ([0.0, 0.0], Status.NOT_DECIDABLE),
    ],
)
def test_not_worse_by_a_margin(differences: list[float], status: Status, tmp_path: Path) -> None:
    text = CLAIMS.replace('"lower"', '"not worse"\nmargin = 0.5').replace('["trim", "random"]', '"trim"')
    full = [5.0, 5.5, 6.0, 5.2, 5.1][: len(differences)]
    folder = write(
        tmp_path / "r", {"full": full, "trim": [a + b for a, b in zip(full, differences, strict=True)]}, text
    )
    (found,) = claims.read(folder).findings
    assert found.status == status
    assert "`trim` against `full`: not worse by 0.50 points" in results.page([claims.read(folder)])


@pytest.mark.parametrize(("limit", "status"), [(60, Status.SUPPORTED), (50, Status.NOT_SUPPORTED)])
def test_too_many_backward_samples_make_a_claim_not_supported(limit: int, status: Status, tmp_path: Path) -> None:
    text = CLAIMS.replace('"lower"', f'"not worse"\nmargin = 0.5\nbackward = {limit}')
    full = [5.0, 5.5, 6.0, 5.2]
    folder = write(tmp_path / "r", {"full": full, "trim": full, "random": full}, text)
    file = folder / "runs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"samples_backward": 10 if row["config"]["method"] == "full" else 6} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [found.status for found in claims.read(folder).findings] == [status] * 2
    assert f"with at most {limit}% of its backward samples (it used 60%)" in results.page([claims.read(folder)])


def test_a_limit_that_is_just_exceeded_is_seen_to_be(tmp_path: Path) -> None:
    """60.4 % read "at most 60% (it used 60%)" beside "not supported"."""
    text = CLAIMS.replace('"lower"', '"not worse"\nmargin = 0.5\nbackward = 60').replace('["trim", "random"]', '"trim"')
    folder = write(tmp_path / "r", {"full": [5.0, 5.5, 6.0], "trim": [5.0, 5.5, 6.0]}, text)
    file = folder / "runs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"samples_backward": 192 if row["config"]["method"] == "full" else 116} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "with at most 60% of its backward samples (it used 60.4%)" in results.page([claims.read(folder)])


def test_records_of_one_topic_have_drawings_of_their_own(tmp_path: Path) -> None:
    """A record that was repeated at a later date showed its drawing for the first one too."""
    errors = {method: [5.0, 5.5, 6.0] for method in ("full", "trim", "random")}
    (tmp_path / "mine").mkdir()
    found = [claims.read(write(tmp_path / "mine" / f"2026-0{month}-01-digits", errors, CLAIMS)) for month in (1, 2)]
    page = results.page(found)
    names = re.findall(rf"{results.DRAWINGS}/(\S+\.svg)", page)
    assert len(set(names)) == len(names) == 2
    assert set(results.drawings(found)) == set(names)
    assert "`mine/2026-01-01-digits`. The smallest difference" in page


def test_a_limit_on_training_time_is_judged_by_runs_that_had_the_machine_to_themselves(tmp_path: Path) -> None:
    text = CLAIMS.replace('"lower"', '"not worse"\nmargin = 0.5\ntime = 70').replace('["trim", "random"]', '"trim"')
    full = [5.0, 5.5, 6.0, 5.2]
    folder = write(tmp_path / "r", {"full": full, "trim": full}, text)
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]

    def found(seconds: float) -> claims.Finding:
        alone = [row | {"seconds": 10.0 if row["config"]["method"] == "full" else seconds} for row in rows]
        (folder / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
        return claims.read(folder).findings[0]

    assert (claims.read(folder).findings[0].status, found(7.0).status, found(7.1).status) == (
        Status.NOT_DECIDABLE, Status.SUPPORTED, Status.NOT_SUPPORTED,
    )  # fmt: skip
    assert "with at most 70% of its training time (it used 71%)" in results.page([claims.read(folder)])


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [("effect", "efect", "Did you mean 'effect'?"), ('"trim"', '"tirm"', "Did you mean 'trim'?")],
)
def test_misspelt_names_in_claims_are_reported(tmp_path: Path, right: str, wrong: str, says: str) -> None:
    errors = {name: [5.0, 5.5, 6.0] for name in ("full", "trim", "random")}
    with pytest.raises(ValueError, match=re.escape(says)):
        claims.read(write(tmp_path / "r", errors, CLAIMS.replace(right, wrong)))


def test_claims_of_a_partial_record_may_have_no_runs_yet(tmp_path: Path) -> None:
    errors = {"full": [5.0, 5.5, 6.0], "trim": [5.0, 5.5, 6.0]}
    text = CLAIMS.replace("effect", "partial = true\neffect")
    record = claims.read(write(tmp_path / "r", errors, text))
    assert [(found.status, found.difference.n) for found in record.findings][1] == (Status.NOT_DECIDABLE, 0)
    assert "no runs yet" not in results.page([claims.read(tmp_path / "r")]).partition("detectable")[0]
    for wrong in (CLAIMS, text.replace("random", "radnom"), text.replace("true", '"yes"')):
        (tmp_path / "r" / "claims.toml").write_text(wrong)
        with pytest.raises((ValueError, TypeError), match="expected"):
            claims.read(tmp_path / "r")


def test_a_corrected_p_value_decides() -> None:
    values = [-0.010, -0.002, -0.008, -0.001, -0.012]
    spread = inference.moments(values)
    assert spread.t is not None
    assert spread.t[1] < 0
    assert claims.judge("lower", spread, 0.04, effect=0.005) == Status.SUPPORTED
    assert claims.judge("lower", spread, 0.08, effect=0.005) == Status.NOT_DECIDABLE


def test_a_finding_for_each_method_corrected_over_the_group(tmp_path: Path) -> None:
    full = [5.0, 5.5, 6.0, 5.2, 5.1]
    trim = [value - 1 + shift for value, shift in zip(full, (0.1, -0.1, 0.05, 0.0, -0.05), strict=True)]
    folder = write(tmp_path / "r", {"full": full, "trim": trim, "random": [6.0, 4.0, 7.0, 4.5, 5.6]})
    record = claims.read(folder)
    first, second = record.findings
    assert (first.claim.method, first.status) == ("trim", Status.SUPPORTED)
    assert first.difference.mean == pytest.approx(-0.01)
    raw = inference.paired_t([a / 100 - b / 100 for a, b in zip(trim, full, strict=True)])
    assert raw is not None
    assert first.p == pytest.approx(2 * raw)  # the smaller of two p-values counts twice
    assert (second.claim.method, second.status) == ("random", Status.NOT_DECIDABLE)
    assert second.detectable is not None
    assert second.detectable > 0.01


def test_a_claim_is_read_in_every_group(tmp_path: Path) -> None:
    full = [5.0, 5.5, 6.0, 5.2, 5.1]
    for optimizer, gain in (("adam", -1.0), ("sgd", 1.0)):
        trim = [value + gain + 0.01 * seed for seed, value in enumerate(full)]
        write(tmp_path / "r", {"full": full, "trim": trim, "random": trim}, optimizer=optimizer)
    text = results.page([claims.read(tmp_path / "r")])
    rows = [line for line in text.splitlines() if "| Trimming helps." in line]
    assert [("adam" in row, "**supported**" in row, "**not supported**" in row) for row in rows] == [
        (True, True, False), (True, True, False), (False, False, True), (False, False, True),
    ]  # fmt: skip
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### d, adam (r)", "### d, sgd (r)"]


def test_engines_tell_arms_of_one_method_apart(tmp_path: Path) -> None:
    text = CLAIMS.replace('["trim", "random"]', '"trim"\nengine = "shared"\nagainst_engine = "exact"')
    text = text.replace('"full"', '"trim"').replace('"lower"', '"same"')
    errors = {"trim/exact": [5.0, 5.5, 6.0, 5.2], "trim/shared": [5.1, 5.4, 6.1, 5.1], "full": [1.0, 1.0, 1.0, 1.0]}
    (found,) = claims.read(write(tmp_path / "r", errors, text)).findings
    assert found.status == Status.SUPPORTED
    assert found.difference.mean == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("effect = = 1", "to be TOML"),
        ("title = 'x'", "`effect` to be a number"),
        ("effect = 0.5", "`claim` to be tables"),
        (CLAIMS.replace("says =", "say ="), "got 'say' beside them"),
        (CLAIMS.replace('says = "lower"', ""), "none called 'says'"),
        (CLAIMS.replace('"lower"', '"better"'), "`says` to be one of 'lower', 'higher', 'same', 'not worse'"),
        (CLAIMS.replace('"lower"', '"not worse"'), "expected `margin`, in points, with a claim that says 'not worse'"),
        (CLAIMS + "margin = 0.5", "got 0.5 with 'lower'"),
        (
            CLAIMS.replace('["trim", "random"]', "[]"),
            "expected at least one `method` in a claim, got an empty list",
        ),
        (
            CLAIMS.replace('"lower"', '"not worse"') + "margin = -1",
            "`margin` to be positive and finite, got -1. In points",
        ),
        (CLAIMS.replace('"random"', '"radnom"'), "'radnom' with 'full'"),
        (
            CLAIMS.replace('"random"', '"trim"'),
            r"each `method` of a claim once, got \['trim', 'trim'\]",
        ),  # Holm counted both
        ("effect = 0.5\nclaim = [1, 2]", "`claim` to be tables"),  # an AttributeError
        (CLAIMS + "seed = 1", "got 'seed' beside them in .*claims.toml(?!.*mean 'seed')"),
    ],
)
def test_wrong_claims_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = write(tmp_path / "r", {"full": [5.0, 5.5, 6.0], "trim": [5.0, 5.5, 6.0], "random": [5.0, 5.5, 6.0]}, text)
    with pytest.raises((ValueError, TypeError), match=message):
        claims.read(folder)


@pytest.mark.slow  # the code runs in the default tests around it
def test_the_gain_of_every_method_stands_beside_the_training_error(tmp_path: Path) -> None:
    errors = {"full": [3.0, 3.1, 3.2], "trim": [2.0, 2.2, 2.2], "random": [4.0, 4.2, 4.2], "ohem": [2.0, 3.1, 4.2]}
    read = []
    for width in range(1, results.SEVERAL + 1):
        few = errors if width > 1 else {name: errors[name] for name in ("full", "trim", "random")}
        folder = write(tmp_path / f"r{width}", few, width=width)
        lines = (folder / "runs.jsonl").read_text().splitlines()
        rows = [json.loads(line) | {"curve": {"train_error": [0.5, 0.1 / width]}} for line in lines]
        (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        read.append(claims.read(folder))
    first, further = re.findall(r"(?:^\|.*\n)+", results.page(read).partition("When does")[2], re.MULTILINE)[:2]
    assert [line.split(" | ")[2] for line in first.splitlines()[2:]] == ["3.33", "5.00", "10.00"]
    assert first.splitlines()[2].split(" | ")[3].startswith("\N{MINUS SIGN}0.97 (")
    assert further.splitlines()[0].endswith("| `random` |"), "ohem has too few problems"
    assert [line.split(" | ")[3] for line in further.splitlines()[2:]] == ["**+1.03** |"] * 3
    assert "ohem" not in results.page(read[:2]).partition("Other methods")[2].partition("## ")[0]


@pytest.mark.slow
def test_the_results_page_is_what_the_records_say() -> None:
    folders = sorted(
        path.parent for path in ROOT.glob("records/*/claims.toml") if (path.parent / "runs.jsonl").exists()
    )
    if not folders:
        pytest.skip("no record has runs yet")
    found = [claims.read(folder) for folder in folders]
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results.page(found)
    kept = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / results.DRAWINGS).glob("*.svg")}
    assert kept == results.drawings(found)


def test_the_page_has_a_drawing_of_each_problem_and_says_when_trimming_helps(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", {"full": [5.0, 5.5, 6.0], "trim": [4.0, 4.6, 5.1], "random": [5.0, 5.6, 6.0]})
    file = folder / "runs.jsonl"
    rows = [json.loads(line) | {"curve": {"train_error": [0.2, 0.01]}} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "page.md"
    results.write([claims.read(folder)], out)
    text = out.read_text()
    assert "| d (r) | 3 | 1.00 | \N{MINUS SIGN}0.93" in text
    assert "](drawings/results/r-d.svg)" in text
    drawing = (tmp_path / "drawings" / "results" / "r-d.svg").read_text()
    assert drawing.startswith("<svg")
    assert "<style>" in drawing
    assert all(f">{name}<" in drawing for name in ("full", "trim", "random"))
    assert "http" not in drawing.replace("http://www.w3.org/2000/svg", "")


def test_training_times_are_those_of_runs_that_had_the_machine_to_themselves(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "r", {"full": [5.0, 5.5], "trim": [4.0, 4.6], "random": [5.0, 5.6], "by_accuracy": [5, 6]}
    )
    assert "-time.svg" not in results.page([claims.read(folder)])
    rows = map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
    seconds = {"full": 8.0, "trim": 6.0, "random": 7.0}
    alone = [row | {"seconds": seconds[row["config"]["method"]]} for row in rows if row["config"]["method"] in seconds]
    (folder / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone if row["config"]["seed"] == 0))
    record = claims.read(folder)
    assert {arm.label: arm.cost.get("seconds") for arm in record.groups[0].arms} == seconds | {"by_accuracy": None}
    assert "](drawings/results/r-d-time.svg)" in results.page([record])
    drawing = results.drawings([record])["r-d-time.svg"]
    assert "training time" in drawing
    assert all(f">{name}<" in drawing for name in seconds)
    assert ">by_accuracy<" not in drawing


def test_times_go_to_the_group_of_their_settings(tmp_path: Path) -> None:
    """Groups were matched by title, which names what tells those of one file apart: `alone.jsonl` may hold only one."""
    folder = write(tmp_path / "r", {"full": [5.0, 5.5], "trim": [4.0, 4.6], "random": [5.0, 5.6]})
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    small = [row | {"key": f"s{row['key']}", "config": row["config"] | {"train_size": 100}} for row in rows]
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *small]))
    alone = [row | {"seconds": 8.0} for row in small if row["config"]["seed"] == 0]
    (folder / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    found = {group.settings.get("train_size"): group.arms for group in claims.read(folder).groups}
    assert {size: [arm.cost.get("seconds") for arm in arms] for size, arms in found.items()} == {
        None: [None] * 3, 100: [8.0] * 3
    }  # fmt: skip
