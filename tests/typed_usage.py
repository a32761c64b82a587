"""Public names as a type checker sees them; test_packaging.py gives it this file. It is never run."""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

import batchtrim
from batchtrim import Choice, KeepLog, Losses, Selection, TrimmedForward, Trimmer
from batchtrim.compat import SuperquantileReducer, get_adapted_loss_for_trimmed_minibatch, reduce_superquantile

losses: Tensor = torch.rand(8)

trim = Trimmer(batchtrim.linear(1.0, 0.2), total=10, select=batchtrim.between(skip=0.1))
assert_type(trim(losses), Tensor)
assert_type(trim.select(losses), Selection)
assert_type(trim.keep, float)
assert_type(trim.progress, float)
assert_type(trim.step(), None)
assert_type(trim.state_dict(), dict[str, Any])

assert_type(batchtrim.linear(1.0, 0.2)(0.5), float)
assert_type(batchtrim.keep_count(0.2, 128), int)
assert_type(batchtrim.hardest()(losses, 0.5), Selection)
assert_type(batchtrim.hardest()(losses, 0.5).indices, Tensor)
assert_type(batchtrim.hardest()(losses, 0.5).weights, Tensor | None)
assert_type(batchtrim.reduce(losses, batchtrim.hardest()(losses, 0.5)), Tensor)

assert_type(batchtrim.per_sample(nn.CrossEntropyLoss())(losses, losses), Losses)
assert_type(batchtrim.token_losses(losses, losses).mask, Tensor | None)
assert_type(batchtrim.focal(losses), Tensor)

step = TrimmedForward(nn.Linear(2, 2), nn.CrossEntropyLoss(), trim)
assert_type(step(losses, losses), Tensor)

log = KeepLog(100, classes=10)
log.record(trim.last, ids=losses)
log.record(step.last, ids=losses, labels=losses)
assert_type(trim.last, Choice | None)
assert_type(log.table(), dict[str, Tensor])
assert_type(batchtrim.suspects(log), tuple[Tensor, Tensor])

assert_type(get_adapted_loss_for_trimmed_minibatch(losses, 0, 10, 1.0, 0.2, "linear"), Tensor)
assert_type(reduce_superquantile(losses, superquantile_tail_fraction=0.5), Tensor)
assert_type(SuperquantileReducer().forward(losses), Tensor)

Trimmer("20%", total=10)  # type: ignore[arg-type]
Trimmer(total="10")  # type: ignore[arg-type]
batchtrim.keep_count(0.2, 1.5)  # type: ignore[arg-type]
trim([0.5, 1.0])  # type: ignore[arg-type]
