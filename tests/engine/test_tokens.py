"""Tokens as rows: the layers between a language model's last attention and its loss run on the kept ones alone."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import error, gradient
from torch import Tensor, nn

import batchtrim
from batchtrim.engine.cutting import KeptRows, cut, gather, put_back, spread
from batchtrim.engine.layout import Axis, RowLayout
from batchtrim.errors import EngineFallback, EngineRefused
from tiers import few

WORDS = 30


def batch(size: int = 6, length: int = 9) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, WORDS, (size, length))
    y = x.clone()
    y[0, length // 3 :] = -100  # padding
    return x, y


@pytest.mark.parametrize(("shift", "layers"), few([(True, 1), (True, 2), (False, 2)], [(True, 1)]))
def test_a_language_model_is_exact_and_cut_down_to_its_last_attention(shift: bool, layers: int) -> None:
    torch.manual_seed(0)
    model = zoo.LanguageModel(WORDS, layers=layers)
    loss = functools.partial(batchtrim.token_losses, shift=shift)
    steps = {
        engine: batchtrim.TrimmedForward(model, loss, batchtrim.Trimmer(0.4, unit="element"), engine)
        for engine in ("exact", "shared")
    }
    for size, length in ((6, 9), (6, 9), (4, 9), (5, 7)):
        x, y = batch(size, length)
        found = {}
        for engine, step in steps.items():
            model.zero_grad()
            value = step(x, y)
            value.backward()
            found[engine] = value.detach(), gradient(model), step.last.selection.indices
        torch.testing.assert_close(found["shared"][0], found["exact"][0])
        assert torch.equal(found["shared"][2], found["exact"][2])
        assert error(found["exact"][1], found["shared"][1]) <= 1e-5
    engine = steps["shared"].engine
    assert engine.capture.traces == 1, "batches of other sizes and lengths run in one trace"
    place, _ = engine.trace.mixing(True)
    assert "attention" in place
    upper = [str(node.target) for node in engine.trace.slices(True).upper.graph.graph.nodes]
    assert upper.count("aten.mm.default") >= 2 + 2 * 3, "the head and the last block's three layers"


class Heads(nn.Module):
    """Two heads, merged with samples and tokens into one dimension: between a sample and its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.each, self.head = nn.Embedding(WORDS, 8), nn.Linear(4, 4), nn.Linear(8, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x).unflatten(2, (2, 4)).transpose(1, 2)
        z = self.each(z.reshape(-1, 4)).tanh().view(z.shape)
        return self.head(z.transpose(1, 2).flatten(2))


def test_tokens_of_several_heads_in_one_dimension() -> None:
    """Its backward failed: it was given one head's rows."""
    torch.manual_seed(0)
    model, found = Heads(), []
    for engine in ("exact", "shared"):
        model.zero_grad()
        step = batchtrim.TrimmedForward(model, batchtrim.token_losses, batchtrim.Trimmer(0.4, unit="element"), engine)
        x, y = torch.arange(54).view(6, 9) % WORDS, torch.arange(54).view(6, 9) % 7
        step(x, y).backward()
        found.append(gradient(model))
    assert error(*found) <= 1e-5


class Translator(nn.Module):
    """An encoder and a decoder; a recurrent layer instead has a trace for one length only."""

    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
        made = nn.GRU(8, 8, batch_first=True) if recurrent else nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)
        self.layers = made

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.layers, nn.GRU):
            return self.head(self.layers(self.embed(target))[0])
        return self.head(self.layers(self.embed(source), self.embed(target)))


def by_tokens(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none")


@pytest.mark.slow
def test_a_translation_has_as_many_rows_as_its_target_has_tokens() -> None:
    torch.manual_seed(0)
    model = Translator()
    steps = {
        engine: batchtrim.TrimmedForward(model, by_tokens, batchtrim.Trimmer(0.4, unit="element"), engine)
        for engine in ("exact", "shared")
    }
    for source, target in ((9, 6), (9, 6), (5, 7), (8, 3)):
        x = torch.randint(WORDS, (6, source)), torch.randint(WORDS, (6, target))
        y = torch.randint(WORDS, (6, target))
        found = {}
        for engine, step in steps.items():
            model.zero_grad()
            step(x, y).backward()
            found[engine] = gradient(model)
        assert error(found["exact"], found["shared"]) <= 1e-5
    engine = steps["shared"].engine
    assert engine.capture.traces == 1
    assert engine.trace.cost(True).share > 0.1


@pytest.mark.slow
def test_a_recurrent_layer_fixes_the_number_of_tokens_and_the_refusal_says_so() -> None:
    step = batchtrim.TrimmedForward(Translator(True), by_tokens, batchtrim.Trimmer(0.5, unit="element"), "shared")
    x = torch.randint(WORDS, (6, 4))
    with pytest.raises(EngineRefused, match="takes their number, 4, for a constant, as a recurrent layer does"):
        step((x, x), x)


@pytest.mark.slow
def test_only_the_kept_tokens_of_the_head_are_saved() -> None:
    torch.manual_seed(0)
    model = zoo.LanguageModel(WORDS)
    trim = batchtrim.Trimmer(0.25, unit="element")
    step = batchtrim.TrimmedForward(model, batchtrim.token_losses, trim, "shared")
    sizes: list[int] = []
    cut_tape = step.engine._cut

    def noted(tape: object, *rest: object) -> None:
        cut_tape(tape, *rest)
        sizes.extend(t.shape[0] for t in tape.kept.values() if WORDS in t.shape)  # type: ignore[attr-defined]
        assert not any(WORDS in t.shape[1:] for t in tape.saved.values())  # type: ignore[attr-defined]

    step.engine._cut = noted
    x = torch.randint(0, WORDS, (6, 8))
    step(x, x).backward()
    assert sizes
    assert set(sizes) == {12}


@pytest.mark.slow
def test_pixels_are_not_tokens_and_run_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 1)
    x, y = torch.randn(4, 3, 4, 4), torch.randint(5, (4, 4, 4))
    y[0] = 3
    loss = batchtrim.per_sample(nn.CrossEntropyLoss(ignore_index=3), unit="element")
    step = batchtrim.TrimmedForward(model, loss, batchtrim.Trimmer(0.25, unit="element"), "auto")
    with pytest.warns(EngineFallback, match=r"takes tokens as rows.*exact"):
        value = step(x, y)
    values = F.cross_entropy(model(x), y, reduction="none")[y != 3]
    k = batchtrim.keep_count(0.25, len(values))
    assert step.last.selection.k == k
    torch.testing.assert_close(value, values.topk(k).values.mean())


@pytest.mark.slow
def test_a_loss_over_the_tokens_of_a_sample_is_refused() -> None:
    def entropy_of_neighbours(logits: Tensor, y: Tensor) -> Tensor:
        return (logits.mean(2) - logits.mean((1, 2))[:, None]).square()

    model = zoo.LanguageModel(WORDS)
    step = batchtrim.TrimmedForward(model, entropy_of_neighbours, batchtrim.Trimmer(0.5, unit="element"), "shared")
    with pytest.raises(EngineRefused, match="mixes rows"):
        step(*batch())


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4, 5, 3), (Axis(0), Axis(1))),
        ((4, 3, 5), (Axis(0), Axis(2))),
        ((5, 4, 3), (Axis(1), Axis(0))),
        ((20, 3), (Axis(0, 1, 5), Axis(0, 4, 1))),
        ((4, 6, 3), (Axis(0), Axis(1, lost=-1))),
        ((3, 20), (Axis(1, 1, 5), Axis(1, 4, 1))),
    ],
)
def test_what_was_cut_can_be_put_back(shape: tuple[int, ...], axes: tuple[Axis, Axis]) -> None:
    rows = torch.tensor([0, 7, 8, 19])  # of 4 samples with 5 tokens each
    kept = KeptRows(rows, batch=4, tokens=5)
    whole = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)
    layout = RowLayout(axes)
    taken = cut(whole, layout, kept)
    back = put_back(taken, layout, kept)
    assert back.shape == whole.shape
    assert int((back != 0).sum()) == 4 * 3
    assert torch.equal(back[back != 0], whole[back != 0])
    assert torch.equal(cut(back, layout, kept), taken)
    assert torch.equal(gather(whole, layout, kept), taken)
    assert torch.equal(spread(taken, layout, kept), back)


@pytest.mark.parametrize("axis", [Axis(1), Axis(1, 3, 1), Axis(1, 1, 2), Axis(1, 3, 2)])
def test_samples_that_were_cut_can_be_put_back(axis: Axis) -> None:
    kept = KeptRows(torch.tensor([1, 2]), batch=4)
    whole = torch.arange(1.0, 1.0 + 2 * 4 * axis.outer * axis.inner).reshape(2, 4 * axis.outer * axis.inner)
    for each in (whole, whole.t().contiguous().t()):
        taken = cut(each, RowLayout((axis,)), kept)
        back = put_back(taken, RowLayout((axis,)), kept)
        assert torch.equal(back[back != 0], whole[back != 0])
        assert torch.equal(gather(each, RowLayout((axis,)), kept), taken)
        assert torch.equal(spread(taken, RowLayout((axis,)), kept), back)
        assert taken.shape == (2, 2 * axis.outer * axis.inner)
        assert (taken.stride(0) > taken.stride(1)) == (each.stride(0) > each.stride(1)), "memory keeps its order"
