"""Every rule is checked against its operator, for rows along every dimension."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import rule_samples
import torch
from rule_check import S, Sample, Spec, T, mapped, varied, violation

from batchtrim.engine import (  # noqa: F401  (they enter their rules)
    rules,
    rules_attention,
    rules_nn,
    rules_products,
    rules_shape,
)
from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Mixes
from tiers import few

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd calls is not the subject

# rules that no call here can show: they need a GPU, give memory nobody has written, or refuse whatever they see
NOT_SHOWN = {
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
    "cudnn_batch_norm", "cudnn_batch_norm_backward", "miopen_batch_norm", "_batch_norm_with_update_functional",
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    "as_strided", "as_strided_scatter", "_reshape_alias",
    "_fused_rms_norm_backward", "randint_like", "bernoulli", "exponential", "normal_functional", "random", "uniform",
    "rrelu", "rrelu_with_noise_functional", "celu",
}  # fmt: skip
if torch.__version__ < "2.9":
    NOT_SHOWN.add("_fused_rms_norm")  # it took other arguments, on MPS alone


def operators() -> list[Any]:
    """Return every functional operator of aten that has a rule or is pointwise."""
    found = []
    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("aten::") or any(argument.is_out for argument in schema.arguments):
            continue
        packet = getattr(torch.ops.aten, schema.name.split("::")[1], None)
        func = getattr(packet, schema.overload_name or "default", None)
        made = any("Tensor" in str(each.type) for each in schema.returns)
        if func is not None and made and not func._schema.is_mutable and rules.has_rule(func):
            found.append(func)
    return sorted(set(found), key=str)


def entry_by_entry(count: int) -> Callable[[random.Random], Iterable[Sample]]:
    chosen = [each for each in operators() if rules._RULES.get(name_of(each), rules.pointwise) is rules.pointwise]
    chosen = [each for each in chosen if not name_of(each).startswith(("empty", "rand"))]
    return lambda draw: (sample for each in chosen for sample in rule_samples.pointwise(each, draw, count))


def failures(
    samples: Callable[[random.Random], Iterable[Sample]], seed: int, tries: int, symbols: Any = (S,)
) -> tuple[list[str], Counter[str]]:
    """Return what is wrong, and how often each operator was let through."""
    draw = random.Random(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    found, passed = [], Counter[str]()

    def other(each: Any) -> Any:
        return varied(each, draw) if isinstance(each, Spec) else each

    for sample in samples(draw):
        for number in range(tries):
            one = Sample(sample.func, *mapped((list(sample.args), sample.kwargs), other))
            try:
                wrong = violation(one, symbols, k=1 if number % 4 == 3 else 3)
            except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError):
                continue  # no call that the operator takes
            if wrong:
                found.append(f"{one.func}: {wrong}; {one.args} {one.kwargs}")
            elif wrong is not None:
                passed[name_of(one.func)] += 1
    return found, passed


@pytest.mark.parametrize(("tries", "count"), few([(1, 350), (2, 700)], [(1, 350)]))
def test_rules_keep_their_promise(tries: int, count: int) -> None:
    wrong, by_hand = failures(rule_samples.by_hand, 0, tries)
    others, entries = failures(entry_by_entry(2), 0, 1)
    assert not [*wrong, *others]
    assert by_hand.total() > count
    assert entries.total() > 300


@pytest.mark.slow
def test_rules_keep_their_promise_often() -> None:
    found, passed = [], Counter[str]()
    for seed in range(1, 3):
        for samples, tries in ((rule_samples.by_hand, 12), (entry_by_entry(30), 2)):
            wrong, right = failures(samples, seed, tries)
            found += wrong
            passed += right
    assert not found
    assert {name_of(each) for each in operators()} - set(passed) <= NOT_SHOWN


@pytest.mark.slow
def test_rules_keep_their_promise_to_tokens() -> None:
    wrong, passed = failures(rule_samples.tokens, 0, 8, (S, T))
    assert not wrong
    assert passed.total() > 50


def test_a_pad_takes_rows_along_every_dimension_that_it_leaves_alone() -> None:
    """``torch.stft`` pads signals (B, T) as (1, B, T)."""
    func = torch.ops.aten.reflection_pad1d_backward.default
    for rows in ((S, 2), (1, S)):
        assert violation(Sample(func, [Spec((*rows, 7)), Spec((*rows, 4)), [1, 2]], {}), (S,), k=3) == ""
    assert violation(Sample(func, [Spec((2, 2, S + 3)), Spec((2, 2, S)), [1, 2]], {}), (S,), k=3) is None


def test_rows_that_are_all_alike_lie_along_one_dimension() -> None:
    """``torch.ones(2 * B, 1).expand(2 * B, 2 * B).sum(1)`` counts the rows, and backward may compute it."""
    alike = Spec((2 * S, 1), factors=(None, 1))
    assert violation(Sample(torch.ops.aten.expand.default, [alike, [2 * S, 6]], {}), (S,), k=3) == ""
    assert violation(Sample(torch.ops.aten.expand.default, [alike, [2 * S, 2 * S]], {}), (S,), k=3) is None


def test_rows_that_are_all_alike_stay_in_blocks_when_dimensions_are_merged() -> None:
    """``scale.expand(2 * B, 3).reshape(6 * B)`` repeats three values, which no other order of its factors keeps."""
    func = torch.ops.aten.view.default
    for inside, shape in ((3, [6 * S]), (3, [2 * S, 1, 3]), (6, [S, 12]), (1, [2 * S]), (3, [2, 3 * S])):
        assert violation(Sample(func, [Spec((2 * S, inside), factors=(None, 1)), shape], {}), (S,), k=3) == ""
    for inside, shape in ((3, [3, 2 * S]), (4, [8, S])):
        assert violation(Sample(func, [Spec((2 * S, inside), factors=(None, 1)), shape], {}), (S,), k=3) is None
    merged = rules_shape.view_axis(Axis(0, None), S, (2 * S, 3), (6 * S,))
    for other in (Axis(0, 2, 3), Axis(0, None, 6), Axis(0, 1, 6)):
        assert rules.same_axis(merged, other) == rules.same_axis(other, merged) == other
    for other in (Axis(0, 6, 1), Axis(0, 3, 2), Axis(0, None, 2)):
        for pair in ((merged, other), (other, merged)):
            with pytest.raises(Mixes, match="it combines different rows"):
                rules.same_axis(*pair)
