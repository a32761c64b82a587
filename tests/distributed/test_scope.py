"""Selection over all ranks, in real processes over gloo. The cases are in scope_worker.py."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import batchtrim
from batchtrim.distributed import select_over_ranks
from launch import run_ranks

WORKER = Path(__file__).parent / "scope_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_as_one_process_with_the_joined_batch(ranks: int, tmp_path: Path) -> None:
    run_ranks(WORKER, ranks, tmp_path)


def test_without_a_process_group_it_is_the_local_choice() -> None:
    losses = torch.tensor([1.0, 3.0, 2.0, 0.0])
    assert batchtrim.Trimmer(0.5, scope="global")(losses).item() == 2.5


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected `scope` to be one of 'local', 'global', got 'all'"):
        batchtrim.Trimmer(0.5, scope="all")
    with pytest.raises(ValueError, match="expected `scope` 'global' with a `process_group`"):
        batchtrim.Trimmer(0.5, process_group=object())  # type: ignore[arg-type]


def test_losses_of_all_ranks_in_one_tensor_are_refused() -> None:
    """A DTensor ended in "aten.is_set_to.default does not have a sharding strategy registered"."""

    class Sharded(torch.Tensor):
        def to_local(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    losses = torch.rand(4).as_subclass(Sharded)
    with pytest.raises(TypeError, match=r"each rank's own losses with scope='global', got a DTensor.*to_local\(\)"):
        select_over_ranks(batchtrim.hardest(), losses, losses, 0.5)


def test_a_trimmer_with_a_group_says_why_it_cannot_be_pickled() -> None:
    trim = batchtrim.Trimmer(0.5, scope="global")
    trim.process_group = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"without `process_group` to pickle, got one with it\. .* state_dict"):
        pickle.dumps(trim)
    assert copy.copy(trim).process_group is copy.deepcopy(trim).process_group is trim.process_group
    trim.process_group = None
    assert pickle.loads(pickle.dumps(trim)).keep == 0.5
