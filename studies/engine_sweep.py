"""Check which models of transformers each engine computes right: tiny configurations, with and without dropout.

    python -m studies.engine_sweep --out runs/engine-sweep                     # everything, resumable
    python -m studies.engine_sweep --out runs/engine-sweep --part 1/2          # one of two processes
    python -m studies.engine_sweep --out runs/engine-sweep --first             # one class of each model type alone
    python -m studies.engine_sweep --out runs/engine-sweep --engines shared --only bert gpt2 vit
    python -m studies.engine_sweep --out runs/engine-sweep --table             # only write table.md again

Each (class, dropout, engine) is one call of ``batchtrim.testing.check_engine``: six steps on batches of 8, 8 and 5
samples, of which half, a fifth and three quarters are kept, with weight updates in between. The verdict is one of

* "right": gradients are those of a plain step up to 1e-5; buffers, generators and batches are the same;
* "approximate": the engine reports that its gradient is not exact, and why (BatchNorm; dropout in two_pass);
* "refused": the engine reports why it does not run the model;
* "wrong": anything else. There must be none;
* "not run": the plain model does not train with the tiny configuration, which says nothing about an engine.

Each verdict is appended to results.jsonl as one line and is not computed again; table.md is made from that file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from batchtrim import Losses, token_losses
from batchtrim.engine.auto import AutoEngine
from batchtrim.engine.cost import Forecast
from batchtrim.testing import check_engine
from studies.hf_losses import seed
from studies.hf_models import FAMILIES, Family, tiny_config, tiny_model
from studies.time_limit import TooLong, time_limit

PARAMETERS = 3_000_000  # with more, the configuration is not tiny
SECONDS = 150  # time limit for a plain step, and for a check
SIZES = (8, 8, 5)
ENGINES = ("shared", "two_pass", "auto")
VERDICTS = ("right", "approximate", "refused", "wrong", "not run")
DROPOUT = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "dropout", "attention_dropout",
    "activation_dropout", "hidden_dropout", "classifier_dropout", "classifier_dropout_prob", "dropout_rate",
    "attn_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "drop_rate", "attention_drop_rate", "dropout_prob",
    "drop_connect_rate", "summary_first_dropout", "summary_last_dropout", "feat_proj_dropout", "final_dropout",
    "emb_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout", "seq_classif_dropout", "drop_mlp_rate",
    "drop_proj_rate", "residual_dropout",
)  # fmt: skip
LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # always 0: a branch on a drawn number, no graph
_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "qformer_config", "backbone_config")


@dataclass(frozen=True)
class Task:
    """The training of a family of model classes: its per-sample loss, and what ``x`` contains besides the inputs."""

    family: str
    loss: Callable[[Any, Any], Tensor | Losses]
    shifted_into_decoder: bool = False

    @property
    def table(self) -> Family:
        return FAMILIES[self.family]


def _logits(outputs: Any) -> Tensor:
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def classes(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(_logits(outputs), labels, reduction="none")


def next_tokens(outputs: Any, labels: Tensor) -> Losses:
    return token_losses(_logits(outputs), labels, shift=True)


def tokens(outputs: Any, labels: Tensor) -> Losses:
    return token_losses(_logits(outputs)[:, : labels.shape[1]], labels)


def pixels(outputs: Any, labels: Tensor) -> Losses:
    logits = F.interpolate(_logits(outputs), labels.shape[-2:], mode="bilinear")
    return Losses(F.cross_entropy(logits, labels, reduction="none", ignore_index=255), labels != 255)


def transcripts(outputs: Any, labels: Tensor) -> Tensor:
    scores = _logits(outputs).log_softmax(-1).transpose(0, 1)
    frames = torch.full((scores.shape[1],), scores.shape[0])
    written = torch.full((scores.shape[1],), labels.shape[1])
    return F.ctc_loss(scores, labels, frames, written, reduction="none", zero_infinity=True)


TASKS = (
    Task("ForSequenceClassification", classes),
    Task("ForImageClassification", classes),
    Task("ForAudioClassification", classes),
    Task("ForVideoClassification", classes),
    Task("ForSemanticSegmentation", pixels),
    Task("ForCausalLM", next_tokens),
    Task("ForSeq2SeqLM", tokens, shifted_into_decoder=True),
    Task("ForMaskedLM", tokens),
    Task("ForImageTextToText", next_tokens),
    Task("ForCTC", transcripts),
)


@dataclass
class CheckResult:
    """One line of results.jsonl."""

    task: str
    kind: str
    model: str
    dropout: bool
    engine: str
    verdict: str
    reason: str = ""
    error: float = 0.0
    cosine: float = 1.0
    ran: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, bool, str]:
        return self.task, self.kind, self.model, self.dropout, self.engine


def with_dropout(config: Any, on: bool) -> Any:
    """Set every dropout of a configuration, and of the configurations within it, to 0.1 or to 0; layer drop to 0."""
    for name in DROPOUT:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(0.1 if on else 0.0 for _ in value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.1 if on else 0.0)
    for name in LAYERDROP:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    for part in _PARTS:
        if hasattr(getattr(config, part, None), "to_dict"):
            with_dropout(getattr(config, part), on)
    return config


def make(task: Task, kind: str, name: str, dropout: bool) -> tuple[nn.Module, list[tuple[Any, Any]]]:
    """Return a tiny model of a class in training mode, and its batches."""
    torch.manual_seed(0)
    config = with_dropout(tiny_config(kind, task.table.labels), dropout)
    for key, value in task.table.options.items():
        setattr(config, key, value)
    model = tiny_model(name, config, PARAMETERS).train()
    return model, [_split(task, task.table.batch(size, config)) for size in SIZES]


def _split(task: Task, batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return the model's inputs, and the labels."""
    labels = batch.pop("labels")
    if task.shifted_into_decoder:
        started = torch.cat([torch.ones_like(labels[:, :1]), labels[:, :-1]], 1)
        batch["decoder_input_ids"] = started.masked_fill(started == -100, 0)
    return batch, labels


def plain(task: Task, kind: str, name: str, dropout: bool) -> tuple[nn.Module, list[tuple[Any, Any]]]:
    """Return model and batches after a plain step on each; raise if the model does not train."""
    model, batches = make(task, kind, name, dropout)
    trial = copy.deepcopy(model)
    drawn: list[Tensor] = []
    for x, y in batches[1:]:
        for _ in range(2):
            seed()
            losses = task.loss(copy.deepcopy(trial)(**x), y)
            drawn.append(losses.values if isinstance(losses, Losses) else losses)
        if not torch.equal(*drawn[-2:]):
            raise ValueError("it draws from a generator that cannot be set")
        if not drawn[-1].isfinite().all():
            raise ValueError("its loss is not finite")
        drawn[-1].mean().backward()
    return model, batches


def judged(task: Task, kind: str, name: str, dropout: bool, engine: str, seconds: int = SECONDS) -> CheckResult:
    row = CheckResult(task.family, kind, name, dropout, engine, "not run")
    start = time.perf_counter()
    torch._dynamo.reset()
    try:
        with time_limit(seconds):
            model, (first, *more) = plain(task, kind, name, dropout)
    except TooLong:
        row.reason = f"a plain step takes more than {seconds} seconds"
        return row
    except Exception as error:  # a model may fail in any way with a configuration that it was not made for
        row.reason = _line(f"{type(error).__name__}: {error}")
        return row
    try:
        with time_limit(seconds):
            report = check_engine(model, first, task.loss, engine=engine, more=more, verbose=False)
        row.verdict, row.ran = report.verdict, report.engine
        row.error, row.cosine = max(report.gradient_error, report.parameter_error), report.gradient_cosine
        row.reason = _line(report.failed or report.refused or report.approximate or "")
        if row.verdict == "wrong" and report.failed is None:
            row.reason = _line(str(report))
    except TooLong:
        row.verdict, row.reason = "not run", f"the check takes more than {seconds} seconds"
    except Exception as error:
        row.verdict, row.reason = "wrong", _line(f"{type(error).__name__}: {error}")
    row.seconds = round(time.perf_counter() - start, 1)
    gc.collect()
    return row


def _line(text: str) -> str:
    return " ".join(text.split())[:400]


def cases(
    tasks: list[str], only: list[str], engines: list[str], every: bool = True
) -> Iterator[tuple[Task, str, str, bool, str]]:
    """Yield one class of each model type, with dropout; then, with ``every``, all others.

    A sweep that is stopped early has then covered every architecture.
    """
    first: dict[str, tuple[Task, str, str]] = {}
    others: list[tuple[Task, str, str]] = []
    for task in TASKS:
        if tasks and task.family not in tasks:
            continue
        for kind, name in task.table.classes():
            if (only and kind not in only) or not hasattr(transformers, name):
                continue
            if kind in first:
                others.append((task, kind, name))
            else:
                first[kind] = task, kind, name
    for dropout in (True, False):
        for group in (list(first.values()), others):
            for each in group:
                for engine in engines:
                    yield (*each, dropout, engine)
            if not every:
                return


def read(path: Path) -> dict[tuple[str, str, str, bool, str], CheckResult]:
    if not path.exists():
        return {}
    rows = [CheckResult(**json.loads(line)) for line in path.read_text().splitlines() if line.endswith("}")]
    return {row.key: row for row in rows}


def table(rows: list[CheckResult]) -> str:
    """Return the counts by engine and task, followed by each case that is neither right nor not run."""
    lines = [f"{len({row.model for row in rows if row.verdict != 'not run'})} model classes.", ""]
    lines += ["| engine | dropout | task | " + " | ".join(VERDICTS) + " | largest error where right |"]
    lines += ["|---" * (len(VERDICTS) + 4) + "|"]
    for engine in dict.fromkeys(row.engine for row in rows):
        for dropout in (True, False):
            own = [row for row in rows if row.engine == engine and row.dropout == dropout]
            for task in [*dict.fromkeys(row.task for row in own), "all"] if own else []:
                lines.append(_counted(engine, dropout, task, [r for r in own if task in (r.task, "all")]))
    for verdict in ("wrong", "refused", "approximate"):
        found = [row for row in rows if row.verdict == verdict]
        if found:
            lines += [
                "",
                f"## {verdict.capitalize()}",
                "",
                "| engine | dropout | class | reason |",
                "|---|---|---|---|",
            ]
            lines += [
                f"| {row.engine} | {'on' if row.dropout else 'off'} | {row.model} | {row.reason.replace('|', '/')} |"
                for row in sorted(found, key=lambda row: (row.engine, row.model, not row.dropout))
            ]
    return "\n".join(lines) + "\n"


def _counted(engine: str, dropout: bool, task: str, rows: list[CheckResult]) -> str:
    counts = Counter(row.verdict for row in rows)
    largest = max((row.error for row in rows if row.verdict == "right"), default=0.0)
    numbers = " | ".join(str(counts[verdict]) for verdict in VERDICTS)
    return f"| {engine} | {'on' if dropout else 'off'} | {task} | {numbers} | {largest:.0e} |"


def quiet() -> None:
    """Silence warnings of torch and transformers, and make ``auto`` trace even models that are too small to pay."""
    AutoEngine.forecast = Forecast(math.inf, 0.0)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for results.jsonl and table.md")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), help="of exact, two_pass, shared, auto")
    parser.add_argument("--tasks", nargs="*", default=[], help=", ".join(task.family for task in TASKS))
    parser.add_argument("--only", nargs="*", default=[], help="model types such as gpt2")
    parser.add_argument("--first", action="store_true", help="one class of each model type alone, with dropout")
    parser.add_argument("--part", default="1/1", help="1/2 and 2/2 in two processes share the work")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="stop a check that takes longer")
    parser.add_argument("--table", action="store_true", help="only make table.md from results.jsonl")
    options = parser.parse_args(arguments)
    quiet()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    done = read(results)
    part, parts = map(int, options.part.split("/"))
    for number, case in enumerate(cases(options.tasks, options.only, options.engines, not options.first)):
        task, kind, name, dropout, engine = case
        if options.table or number % parts != part - 1 or (task.family, kind, name, dropout, engine) in done:
            continue
        row = judged(*case, seconds=options.seconds)
        with results.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(
            f"{row.verdict:11s} {engine:8s} {'on ' if dropout else 'off'} {name} {row.seconds} s {row.reason}",
            flush=True,
        )
    rows = list(read(results).values())
    (options.out / "table.md").write_text(table(rows))
    return 1 if any(row.verdict == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
