"""What is read from a keep log is a snapshot: it stays as it was, and so does the log."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from batchtrim import Choice, KeepLog, hardest

N = 6


def recorded(log: KeepLog, losses: Tensor | None = None, **more: Any) -> KeepLog:
    losses = torch.arange(float(N)) if losses is None else losses
    log.record(Choice(losses, hardest()(losses, 0.5)), ids=range(len(losses)), **more)
    log.end_epoch()
    return log


def test_tables_of_several_epochs() -> None:
    """On a CPU all of them showed the last epoch, and so did a state that was kept in memory."""
    log = KeepLog(N)
    tables, states = [], []
    for _ in range(3):
        tables.append(recorded(log).table())
        states.append(log.state_dict())
    assert [int(table["seen"][0]) for table in tables] == [1, 2, 3]
    again = KeepLog(N)
    again.load_state_dict(states[0])
    assert again.table()["seen"].tolist() == [1] * N


def test_the_epoch_in_a_state_in_memory() -> None:
    log = KeepLog(N)
    losses = torch.arange(float(N))
    log.record(Choice(losses, hardest()(losses, 0.5)), ids=range(N))
    log.table()
    state = log.state_dict()
    log.end_epoch()
    again = KeepLog(N)
    again.load_state_dict(state)
    assert again.end_epoch()["seen"] == N


def test_what_was_read_may_be_changed() -> None:
    log = recorded(KeepLog(N))
    for column in log.table().values():
        column.zero_()
    assert log.table()["last"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    for _ in range(2):
        recorded(log)
        log.end_epoch().clear()  # it raised a KeyError in a later epoch
    assert [line["steps"] for line in log.history] == [1, 2, 3]


@pytest.mark.parametrize("when", ["made", "loaded", "merged"])
def test_a_log_in_inference_mode(when: str) -> None:
    """As a log shared by training and evaluation is: an error of torch's, batches later."""

    def mode(step: str) -> AbstractContextManager[Any]:
        return torch.inference_mode(step == when)

    with mode("made"):
        log = KeepLog(N)
    recorded(log)
    with mode("merged"):
        log.merge(recorded(KeepLog(N)))
    again = KeepLog(N)
    with mode("loaded"):
        again.load_state_dict(log.state_dict())
    assert recorded(again).table()["seen"].tolist() == [3] * N
    assert recorded(log).table()["seen"].tolist() == [3] * N


def test_a_log_copied_in_inference_mode() -> None:
    log = recorded(KeepLog(N))
    with torch.inference_mode():
        again = copy.deepcopy(log)
    again.merge(log)
    assert recorded(again).table()["seen"].tolist() == [3] * N


def test_many_classes_in_a_state_whose_batches_were_not_entered_yet() -> None:
    """Predictions from class 32,768 on came back as others."""
    outputs = torch.nn.functional.one_hot(torch.arange(4) * 13_000, 40_000).float()
    log, again = KeepLog(4), KeepLog(4)
    log.record(Choice(torch.ones(4), hardest()(torch.ones(4), 0.5)), ids=range(4), outputs=outputs)
    again.load_state_dict(log.state_dict())
    assert again.table()["predicted"].tolist() == log.table()["predicted"].tolist() == [0, 13_000, 26_000, 39_000]
    outputs = outputs.roll(500, 1)
    log.record(Choice(torch.ones(4), hardest()(torch.ones(4), 0.5)), ids=range(4), outputs=outputs)
    again.load_state_dict(log.state_dict())
    assert again.table()["predicted"].tolist() == [500, 13_500, 26_500, 39_500]


def test_one_logit_for_two_classes() -> None:
    """Every sample was logged as class 0, with confidence 1.0, and the labels 1 counted as doubtful."""
    logits, labels = torch.tensor([2.0, -2.0, 1.0]), torch.tensor([1, 0, 1])
    with pytest.raises(ValueError, match=r"shape \(3, C\), got \(3, 1\)\. .* from one logit for two classes: F\.pad\("):
        recorded(KeepLog(3), torch.rand(3), outputs=logits[:, None], labels=labels)
    both = torch.nn.functional.pad(logits.reshape(-1, 1), (1, 0))
    assert recorded(KeepLog(3), torch.rand(3), outputs=both, labels=labels).table()["predicted"].tolist() == [1, 0, 1]


def test_ids_of_a_table() -> None:
    """A pandas Series is asked for its own index by torch: "expected `ids` to be integers, got" integers."""

    class Series:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return torch.tensor([2, 0, 1]).numpy()

        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> int:
            raise KeyError(place)

    log, losses = KeepLog(3), torch.tensor([1.0, 2.0, 3.0])
    log.record(Choice(losses, hardest()(losses, 0.5)), ids=Series())  # type: ignore[arg-type]
    assert log.table()["last"].tolist() == [2.0, 3.0, 1.0]
