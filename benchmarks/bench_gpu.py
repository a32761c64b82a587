"""Measure step time, gradient error and peak memory of every engine on a GPU: ResNet-50, ViT-S, BERT-base, small GPT-2.

    python -m benchmarks.bench_gpu --language-model --json out.json
    python -m benchmarks.bench_gpu --networks vit-s --dtypes bf16 --modes eager --json out.json

Every case (network, dtype, eager or compiled) has a process of its own. All cases prepare at the same time, which takes
a minute or more for compiled ones. Then they take turns: nothing else runs while one is timed. Steps of all engines are
interleaved, and ratios are paired within a round. A timed step is forward, selection and backward, without the
optimizer. fp32 is full float32: TF32 is off. bf16 is autocast. "host" is how long a step keeps Python busy: if that is
as long as the step, starting operators takes longer than running them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import queue
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchtrim
from batchtrim.errors import EngineRefused
from benchmarks.bench_engine import gradients, language_model, make_step
from benchmarks.memory import peak_memory
from benchmarks.timing import interleaved, parser_of, ratio, save

Precision = Callable[[], contextlib.AbstractContextManager[Any]]

EAGER = ("plain", "forward", "author", "exact", "two_pass", "shared", "auto")
COMPILED = ("plain", "exact", "two_pass", "shared", "auto")
KEEPS = (0.2, 0.4, 0.6)
FEW = 8  # rows of a batch so small that a step's time is that of starting its operators
MODES = ("eager", "compiled")


def resnet50(norm: str = "batch", tiny: bool = False) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]} if tiny else {}
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000, **sizes))
    return _with_group_norm(model) if norm == "group" else model


def _with_group_norm(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(min(32, child.num_features), child.num_features))
    return model


def vit_s(tiny: bool = False) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    layers, width = (1, 16) if tiny else (12, 384)
    heads = 2 if tiny else 6
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
            num_labels=1000,
        )
    )  # fmt: skip


def bert_base(dropout: float = 0.1, tiny: bool = False) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(num_labels=10, **drop, **(sizes if tiny else {})))


def images(batch: int, device: torch.device) -> tuple[Any, Tensor]:
    return torch.randn(batch, 3, 224, 224, device=device), torch.randint(0, 1000, (batch,), device=device)


def sentences(batch: int, device: torch.device, length: int = 128) -> tuple[Any, Tensor]:
    tokens = torch.randint(0, 30_000, (batch, length), device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens[:, 0] % 10


# network, inputs, rows of a batch
NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., tuple[Any, Tensor]], int]] = {
    "resnet50-group": (functools.partial(resnet50, "group"), images, 128),
    "resnet50-batch": (resnet50, images, 128),
    "vit-s": (vit_s, images, 128),
    "bert-base": (bert_base, sentences, 64),
    "bert-no-dropout": (functools.partial(bert_base, 0.0), sentences, 64),
}


def precision_of(dtype: str, device: torch.device) -> Precision:
    if dtype == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])


def host_seconds(step: Callable[[], Any], rounds: int) -> float:
    """Return the median time that a step keeps Python busy."""
    seconds = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def agreement(model: nn.Module, x: Any, y: Tensor, keep: float, precision: Precision) -> dict[str, float]:
    """Return relative error and cosine of the gradient of shared against exact, with the same dropout masks."""
    found = {}
    for name in ("exact", "shared"):
        own = copy.deepcopy(model)
        step = make_step(name, own, x, y, keep, precision)
        for _ in range(2):  # the second runs what the first traced
            torch.manual_seed(1)
            step()
        found[name] = gradients(own).double()
    exact, shared = found["exact"], found["shared"]
    return {
        "error": float((shared - exact).norm() / exact.norm()),
        "cosine": float(nn.functional.cosine_similarity(exact, shared, dim=0)),
    }


class Case:
    """One network at one precision, eager or compiled."""

    def __init__(self, name: str, dtype: str, mode: str, options: Any) -> None:
        self.told: dict[str, Any] = {"network": name, "dtype": dtype, "mode": mode}
        self.compiled = mode == "compiled"
        self.keeps, self.rounds = options.keeps, options.rounds
        self.device = torch.device(options.device)
        self.precision = precision_of(dtype, self.device)
        build, batch_of, batch = NETWORKS[name]
        self.told["batch"] = options.batch or batch
        torch.manual_seed(0)
        self.model = build(tiny=options.tiny).to(self.device).train()
        self.x, self.y = batch_of(self.told["batch"], self.device)
        self.few = batch_of(FEW, self.device)
        self.first: dict[str, float] = {}
        self.trimmers: list[batchtrim.Trimmer] = []
        self.chosen = {"plain", *filter(None, options.engines.split(","))} if options.engines else set()
        self.told["refused"] = {}
        if self.compiled:
            self.model.compile()

    def steps(self, keep: Callable[[], float | batchtrim.Trimmer], x: Any, y: Tensor) -> dict[str, Callable[[], Any]]:
        engines = [each for each in (COMPILED if self.compiled else EAGER) if not self.chosen or each in self.chosen]
        return {each: make_step(each, self.model, x, y, keep(), self.precision) for each in engines}

    def _trimmer(self) -> batchtrim.Trimmer:
        """Return a trimmer that takes the fractions in turn, once to prepare and once to measure: a trace is kept."""
        turns = [*self.keeps, *self.keeps]
        self.trimmers.append(batchtrim.Trimmer(lambda p: turns[round(p * (len(turns) - 1))], total=len(turns)))
        return self.trimmers[-1]

    def _next_keep(self) -> None:
        for trim in self.trimmers:
            if trim.steps < 2 * len(self.keeps) - 1:
                trim.step()

    def prepare(self) -> None:
        """Trace and compile everything that will be timed."""
        self.all = self.steps(self._trimmer, self.x, self.y)
        for keep in self.keeps:
            for name, step in list(self.all.items()):
                start = time.perf_counter()
                try:
                    step()
                except EngineRefused as refused:
                    self.told["refused"][name] = str(refused)
                    print(f"{self.told['network']} {self.told['dtype']} {self.told['mode']}: {refused}", flush=True)
                    del self.all[name]
                    continue
                self._wait()
                self.first.setdefault(name, time.perf_counter() - start)
                for _ in range(2 if keep == self.keeps[0] else 1):
                    step()
            self._next_keep()
        self.small = {} if self.compiled else self.steps(lambda: 0.5, *self.few)
        for name in [*self.told["refused"], *({"two_pass"} & self.small.keys())]:
            self.small.pop(name, None)  # nobody would choose two passes for a batch this small
        for step in self.small.values():
            step()
            step()
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self) -> dict[str, Any]:
        rows = []
        for keep in self.keeps:
            rows.append(self._row(keep, self.all))
            self._next_keep()
        result = {**self.told, "first_step_seconds": self.first, "rows": rows}
        if self.small:
            times = interleaved(self.small, 3 * self.rounds)
            result["few"] = {
                "batch": FEW, "keep": 0.5,
                "ms": {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
            }  # fmt: skip
        if not self.compiled and "shared" in self.all:
            result.update(agreement(self.model, self.x, self.y, 0.4, self.precision))
        return result

    def _row(self, keep: float, steps: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        times = interleaved(steps, self.rounds)
        row: dict[str, Any] = {"keep": keep, "plain_ms": 1e3 * statistics.median(times["plain"])}
        row["ratios"] = {name: ratio(times, name, "plain") for name in steps if name != "plain"}
        own = [name for name in ("plain", "exact", "shared") if name in steps]
        row["host_ms"] = {name: 1e3 * host_seconds(steps[name], self.rounds) for name in own}
        row["memory"] = {name: peak_memory(steps[name]) for name in own}
        told = " ".join(f"{name} {value:.3f}" for name, value in row["ratios"].items())
        host = " ".join(f"{name} {value:.1f}" for name, value in row["host_ms"].items())
        memory = " ".join(f"{name} {value:.0f}" for name, value in row["memory"].items())
        which = f"{self.told['network']} {self.told['dtype']} {self.told['mode']}"
        print(
            f"{which} q={keep}: plain {row['plain_ms']:.1f} ms | {told} | host ms {host} | MiB {memory}",
            flush=True,
        )
        return row


def small_gpt2(dtype: str, options: Any) -> dict[str, Any]:
    """Measure a GPT-2 of 4 layers with its full vocabulary that keeps half of its tokens."""
    sizes = {"n_embd": 16, "n_head": 2, "vocab_size": 100} if options.tiny else {}
    device = torch.device(options.device)
    batch, precision = 2 if options.tiny else 32, precision_of(dtype, device)
    return {"dtype": dtype, **language_model(options.rounds, batch, device=device, precision=precision, **sizes)}


def failure(key: tuple[str, str, str], why: str) -> dict[str, Any]:
    return {"network": key[0], "dtype": key[1], "mode": key[2], "failed": why}


def run_case(key: tuple[str, str, str], options: Any, room: Any, ready: Any, turn: Any, results: Any) -> None:
    """Prepare, wait until all other cases are prepared, and measure alone."""
    _settle(options)
    outcome: dict[str, Any]
    case = None
    try:
        with room:  # limits the number of cases in memory
            case = Case(*key, options)
            case.prepare()
    except Exception:
        case = None
        outcome = failure(key, traceback.format_exc()[-3000:])
        print(outcome["failed"], flush=True)
    print(f"prepared: {' '.join(key)}{'' if case else ' (failed)'}", flush=True)
    with contextlib.suppress(Exception):  # a case that takes too long must not block the others
        ready.wait(options.prepare_seconds)
    while options.after and not Path(options.after).exists():
        time.sleep(0.5)
    with turn:
        if case is not None:
            if options.timing:  # other programs on the machine can pause while this file exists
                Path(options.timing).touch()
                time.sleep(1.0)
            try:
                outcome = case.measure()
            except Exception:
                outcome = failure(key, traceback.format_exc()[-3000:])
    results.put((key, outcome))


def _gathered(keys: list[Any], crew: list[Any], results: Any, path: str | None) -> dict[Any, dict[str, Any]]:
    """Return every case's result; a process that died without one is a failed case."""
    found: dict[Any, dict[str, Any]] = {}
    while len(found) < len(keys):
        alive = any(each.is_alive() for each in crew)
        try:
            key, outcome = results.get(timeout=2.0)
            found[key] = outcome
            save(path, {"cases": list(found.values())})  # the results so far, in case a later case takes too long
        except queue.Empty:
            if not alive:
                break
    for key in keys:
        found.setdefault(key, failure(key, "its process died"))
    for each in crew:
        each.join()
    return found


def _settle(options: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if options.compile_threads:
        from torch._inductor import config

        config.compile_threads = options.compile_threads


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=7, threads=1, batch=0, compile_threads=0, prepare_seconds=400, at_once=7)
    parser.add_argument("--networks", default="resnet50-group,vit-s,bert-base", help=", ".join(NETWORKS))
    parser.add_argument("--dtypes", default="fp32,bf16", help="of fp32, bf16, fp16")
    parser.add_argument("--modes", default="eager,compiled", help="of eager, compiled")
    parser.add_argument("--more", default="", help="further cases, such as resnet50-batch:bf16:eager")
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)), help="keep fractions")
    parser.add_argument("--engines", default="", help="only these, beside plain")
    parser.add_argument("--device", default="cuda", help="cpu tries the program alone, with --tiny")
    parser.add_argument("--language-model", action="store_true", help="measure a language model that keeps tokens")
    parser.add_argument("--tiny", action="store_true", help="networks of few weights")
    parser.add_argument(
        "--after", default="", help="time nothing before this file is there: other work may go on till then"
    )
    parser.add_argument("--timing", default="", help="a file that is there while a case is timed")
    options = parser.parse_args(arguments)
    options.keeps = tuple(float(keep) for keep in options.keeps.split(","))
    keys = [
        (network, dtype, mode)
        for mode in sorted(options.modes.split(","))  # compiled ones first: they take longest to prepare
        for network in options.networks.split(",")
        for dtype in options.dtypes.split(",")
        if network
    ]
    keys += [tuple(each.split(":")) for each in options.more.split(",") if each]
    context = multiprocessing.get_context("spawn")
    room, ready = context.BoundedSemaphore(options.at_once), context.Barrier(len(keys))
    turn, results = context.Lock(), context.Queue()
    crew = [context.Process(target=run_case, args=(key, options, room, ready, turn, results)) for key in keys]
    for each in crew:
        each.start()
    found = _gathered(keys, crew, results, options.json)
    _settle(options)
    models = [small_gpt2(dtype, options) for dtype in options.dtypes.split(",")] if options.language_model else []
    if options.timing:
        Path(options.timing).unlink(missing_ok=True)
    for key, outcome in found.items():
        if "failed" in outcome:
            print(" ".join(key), "failed:", outcome["failed"], flush=True)
    save(options.json, {"rounds": options.rounds, "cases": [found[key] for key in keys], "language_models": models})


if __name__ == "__main__":
    main()
