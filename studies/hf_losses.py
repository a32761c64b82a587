"""Check that the loss that TrimmedTrainer finds is the model's own, for all classes of transformers that take labels.

    python -m studies.hf_losses                          # all: about 10 minutes, results to stdout
    python -m studies.hf_losses --family ForCausalLM --only gpt2 llama
    python -m studies.hf_losses --out records/2026-11-25-hf-losses

Every class is made with a tiny random configuration and gets one batch of 4, with padding and ignored labels if its
task has them. With the same dropout masks, these are compared:

* the loss that a ``TrimmedTrainer`` finds (``batchtrim.integrations._model_losses.ModelLosses``) with everything kept,
  and its gradient, with ``model(**batch).loss`` and its gradient, in training mode, for ``unit="sample"`` and
  ``"element"``;
* the same losses in evaluation mode, without a gradient;
* each sample's loss with the model's loss of a batch of that sample alone, in evaluation mode.

The verdict is "equal", "refused" (batchtrim reports that it cannot, and why), "different" (an error of batchtrim), or
"not run" (the plain model does not run with the tiny configuration, which says nothing about batchtrim).
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import find_labels

from batchtrim import Trimmer
from batchtrim.engine.compilation import uncompiled
from batchtrim.integrations._labels import loss_of
from batchtrim.integrations._model_losses import ModelLosses
from batchtrim.integrations._recorder import NotFound
from studies.hf_models import FAMILIES, Family, tiny_config, tiny_model
from studies.time_limit import TooLong, time_limit

PARAMETERS = 14_000_000  # with more, the configuration is not tiny
SECONDS = 60
BATCH = 4


def make(family: Family, kind: str, name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a tiny model of a class, and a batch."""
    torch.manual_seed(0)
    config = tiny_config(kind, family.labels)
    for key, value in options.items():
        setattr(config, key, value)
    return tiny_model(name, config, PARAMETERS), family.batch(BATCH, config)


def seed() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (SpecAugment draws from it)
    random.seed(1)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def source(model: nn.Module, unit: str) -> ModelLosses:
    """Return the object that finds the losses in a TrimmedTrainer, without the trainer."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(label_smoothing_factor=0.0), label_smoother=None, trim_options={"unit": unit},
        label_names=find_labels(type(uncompiled(model))), is_fsdp_enabled=False, is_deepspeed_enabled=False,
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped),
    )  # fmt: skip
    return ModelLosses(trainer, None)


def verdict(model: nn.Module, batch: dict[str, Tensor], unit: str) -> str:
    """Return "equal", or a description of the difference."""
    trim = Trimmer(1.0, unit=unit)
    model.train()
    seed()
    plain = loss_of(model(**batch))
    expected = gradient(model, plain)
    seed()
    if not torch.equal(loss_of(model(**batch)), plain):
        return "not run: it draws from a generator that cannot be set"
    seed()
    losses = source(model, unit)
    found = losses(model, batch)
    if losses.ran_eager:  # it draws other numbers than compiled code, in which NumPy's come from torch
        seed()
        plain = loss_of(uncompiled(model)(**batch))
        expected = gradient(model, plain)
    loss = trim(found.losses, rank_by=found.scores)
    if not torch.allclose(loss, plain, rtol=1e-4, atol=1e-5):
        return f"different: {loss.item():.6g} for {plain.item():.6g}"
    got = gradient(model, loss)
    if got.shape != expected.shape or (got - expected).norm() > 1e-3 * expected.norm() + 1e-7:
        return "different: the gradient"
    if losses.ran_eager:
        return "equal: without torch.compile"
    if (
        unit == "sample"
        and uncompiled(model) is model
        and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    ):
        return rows_verdict(model.eval(), batch)
    return evaluation_verdict(model.eval(), batch, unit)


@torch.no_grad()
def evaluation_verdict(model: nn.Module, batch: dict[str, Any], unit: str) -> str:
    seed()
    plain = loss_of(model(**batch))
    seed()
    found = source(model, unit)(model, batch).losses.mean()
    if plain.isfinite() and not torch.allclose(found, plain, rtol=1e-4, atol=1e-5):
        return f"different: in evaluation {found.item():.6g} for {plain.item():.6g}"
    return "equal"


@torch.no_grad()
def rows_verdict(model: nn.Module, batch: dict[str, Tensor]) -> str:
    evaluated = evaluation_verdict(model, batch, "sample")
    if evaluated != "equal":
        return evaluated
    found = source(model, "sample")(model, batch)
    each = found.losses.values if found.scores is None else found.scores
    summed = type(model).__name__.endswith("ForCTC") and model.config.ctc_loss_reduction == "sum"
    each = each / BATCH if summed else each  # scaled so that their mean is the model's sum
    for row in range(BATCH):
        if found.losses.mask is not None and not found.losses.mask[row]:
            continue
        outputs = model(**{name: _of_row(value, row) for name, value in batch.items()})
        alone = loss_of(outputs)
        if not _as_in_batch(found.outputs, outputs, row):
            continue  # the model's own outputs differ for a sample alone
        if alone.isfinite() and not torch.allclose(each[row], alone, rtol=2e-3, atol=1e-4):
            return f"different: sample {row} has {each[row].item():.6g} for {alone.item():.6g}"
    return "equal"


def _of_row(value: Any, row: int) -> Any:
    """Return a sample's part of a batch: one entry, or one for each patch of its image."""
    if not hasattr(value, "__len__") or (isinstance(value, Tensor) and not value.ndim):
        return value
    each = len(value) // BATCH
    return value[row * each : (row + 1) * each]


def _as_in_batch(together: Any, alone: Any, row: int) -> bool:
    pairs = [(together.get(name), alone.get(name)) for name in ("logits", "start_logits", "prediction_logits")]
    return all(torch.allclose(a[row], b[0], rtol=1e-3, atol=1e-4) for a, b in pairs if a is not None and b is not None)


def judged(family: Family, kind: str, name: str, options: dict[str, Any], compiled: bool = False) -> tuple[str, str]:
    """Return the verdict, and its reason if it is not "equal"."""
    try:
        with time_limit(SECONDS):
            model, batch = make(family, kind, name, options)
            plain = loss_of(model.train()(**batch))
            if plain is None or not plain.isfinite() or not plain.requires_grad:
                return "not run", "no loss of the labels"
            plain.backward()
    except TooLong:
        return "not run", "too long"
    except Exception as error:  # a model may fail in any way with a configuration that it was not made for
        return "not run", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150]
    try:
        if compiled:
            model = torch.compile(model, backend="eager")  # type: ignore[assignment]
        with time_limit(SECONDS):
            found = {unit: _or_refused(model, batch, unit) for unit in ("sample", "element")}
        if found["sample"].startswith("not run"):
            return "not run", found["sample"].partition(": ")[2]
        different = next((each for each in found.values() if each.startswith("different")), None)
        worst = different or found["sample"]
        note = (
            f"unit='element' {found['element']}" if worst == "equal" != found["element"] else worst.partition(": ")[2]
        )
        return worst.partition(":")[0], note
    except TooLong:
        return "not run", "too long"
    except Exception as error:
        return "different", f"{type(error).__name__}: {error}"[:300]


def _or_refused(model: nn.Module, batch: dict[str, Tensor], unit: str) -> str:
    try:
        return verdict(model, batch, unit)
    except NotFound as refused:
        return f"refused: {refused}"


def cases(families: list[str], only: list[str]) -> Iterator[tuple[str, Family, str, str, dict[str, Any]]]:
    for label, family in FAMILIES.items():
        if families and label not in families:
            continue
        for kind, name in family.classes():
            if only and kind not in only:
                continue
            if hasattr(transformers, name):
                yield label, family, kind, name, family.options


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", nargs="*", default=[], help=", ".join(FAMILIES))
    parser.add_argument("--only", nargs="*", default=[], help="model types such as gpt2")
    parser.add_argument("--compiled", action="store_true", help="every model through torch.compile(backend='eager')")
    parser.add_argument("--out", type=Path, help="a folder for results.tsv")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines: list[tuple[str, ...]] = []
    for label, family, kind, name, extra in cases(options.family, options.only):
        result, reason = judged(family, kind, name, extra, options.compiled)
        lines.append((label, kind, name, result, re.sub(r"\s+", " ", reason)))
        print("\t".join(lines[-1]), flush=True)
    counts = {label: Counter(line[3] for line in lines if line[0] == label) for label in FAMILIES}
    columns = ("equal", "refused", "different", "not run")
    table = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    table += [
        f"| {label} | " + " | ".join(str(found[each]) for each in columns) + " |"
        for label, found in counts.items()
        if found
    ]
    whole: Counter[str] = sum(counts.values(), Counter())
    table.append("| all | " + " | ".join(str(whole[each]) for each in columns) + " |")
    print("\n".join(table), file=sys.stderr)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = ["family\tmodel type\tclass\tresult\treason", *("\t".join(line) for line in lines)]
        (options.out / "results.tsv").write_text("\n".join(text) + "\n")
        (options.out / "table.md").write_text("\n".join(table) + "\n")
    return 1 if whole["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
