"""Measure step time, gradient error and peak memory of every engine beside plain training.

    python -m benchmarks.bench_engine [--models resnet18-group,vit] [--rounds 15] [--json out.json]

A timed step is forward, selection and backward on one batch. "author" is the published rule: the mean of ``topk`` on
the full graph. "floor" is the lowest possible cost of a step with one forward of the whole batch: f + (1 - f) q, if a
forward without a graph takes the share f of a plain step. That is (1 + 2q) / 3 if f is a third.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from batchtrim.errors import EngineFallback
from batchtrim.lab.task import data
from benchmarks.memory import peak_memory
from benchmarks.networks import Refused, Vit, bert, resnet18, small
from benchmarks.timing import interleaved, parser_of, ratio, save

BATCH = 128
KEEPS = (0.2, 0.4, 0.6, 0.8)
ENGINES = ("author", "exact", "two_pass", "shared", "auto")


@functools.cache
def _labelled_images() -> tuple[Tensor, Tensor]:
    """Return CIFAR-10, or scikit-learn's digits at the same size: real images, so that a network learns."""
    name = "cifar10" if os.environ.get("BATCHTRIM_DATA") else "digits"
    found = data.load(name)
    images = found.train_images[:10_000].float() / 255 * 2 - 1
    if images.shape[-1] != 32:
        images = F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return images, found.train_labels[:10_000].long()


def some_images() -> tuple[Any, Tensor]:
    images, labels = _labelled_images()
    rows = torch.randint(len(labels), (BATCH,))
    return images[rows], labels[rows]


def sentences() -> tuple[Any, Tensor]:
    tokens = torch.randint(0, 4096, (BATCH, 64))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens[:, 0] % 10


def classify(outputs: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(getattr(outputs, "logits", outputs), y, reduction="none")


# network, inputs, and by how much its step under `shared` may exceed (1 + 2q) / 3
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, Tensor]], float]] = {
    "resnet18-group": (lambda: resnet18("group"), some_images, 0.06),
    "resnet18-batch": (lambda: resnet18("batch"), some_images, 0.06),
    "vit": (lambda: Vit("batch_first"), some_images, 0.08),
    "vit-mha": (lambda: Vit("time_major"), some_images, 0.08),
    "bert": (bert, sentences, 0.08),
    "bert-no-dropout": (lambda: bert(0.0), sentences, 0.08),
}


def make_step(
    name: str,
    model: nn.Module,
    x: Any,
    y: Tensor,
    keep: float | batchtrim.Trimmer,
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Callable[[], Tensor]:
    """Return a function that runs one step of an engine and returns the loss after backward.

    Args:
        keep: the fraction kept, or a trimmer that determines it. precision: a context for the forward.
    """
    trim = keep if isinstance(keep, batchtrim.Trimmer) else batchtrim.Trimmer(keep)

    def forward() -> Tensor:
        with precision():
            return classify(model(**x) if isinstance(x, dict) else model(x), y)

    if name == "forward":
        return torch.no_grad()(forward)
    engine: Any = None
    if name not in ("plain", "author"):
        engine = batchtrim.TrimmedForward(model, classify, trim, name)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        if engine is not None:
            with precision():
                loss = engine(x, y)
        else:
            losses = forward()
            loss = (
                losses.mean() if name == "plain" else losses.topk(batchtrim.keep_count(trim.keep, len(y))).values.mean()
            )
        loss.backward()
        return loss.detach()

    return step


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def warm_up(model: nn.Module, batches: Callable[[], tuple[Any, Tensor]], steps: int) -> None:
    """Train for a few steps, so that gradients and statistics are those of a network in training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        x, y = batches()
        loss = classify(model(**x) if isinstance(x, dict) else model(x), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def agreement(model: nn.Module, batches: list[tuple[Any, Tensor]], keep: float) -> dict[str, Any]:
    """Compare the gradients of two_pass and shared with those of exact, over all parameters together.

    Returns:
        The largest relative error, the median cosine, and every batch's cosine.
    """
    errors: dict[str, list[float]] = {"two_pass": [], "shared": []}
    cosines: dict[str, list[float]] = {"two_pass": [], "shared": []}
    for x, y in batches:
        found = {}
        for name in ("exact", *errors):
            own = copy.deepcopy(model)
            torch.manual_seed(1)
            make_step(name, own, x, y, keep)()
            found[name] = gradients(own).double()
        exact = found.pop("exact")
        for name, gradient in found.items():
            errors[name].append(float((gradient - exact).norm() / exact.norm()))
            cosines[name].append(float(F.cosine_similarity(gradient, exact, dim=0)))
    result: dict[str, Any] = {"cosines": cosines}
    for name in errors:
        result[f"{name}_error"] = max(errors[name])
        result[f"{name}_cosine"] = statistics.median(cosines[name])
    return result


def measure(name: str, keeps: tuple[float, ...], rounds: int, seed: int = 0) -> dict[str, Any]:
    build, inputs, allowance = CASES[name]
    torch.manual_seed(seed)
    model = build().train()
    warm_up(model, inputs, steps=60 if name == "resnet18-batch" else 5)
    batches = [inputs() for _ in range(5 if name == "resnet18-batch" else 1)]
    x, y = batches[0]
    rows = []
    for keep in keeps:
        steps = {engine: make_step(engine, model, x, y, keep) for engine in ("plain", "forward", *ENGINES)}
        times = interleaved(steps, rounds)
        row: dict[str, Any] = {"keep": keep, "limit": (1 + 2 * keep) / 3 + allowance}
        row["plain_ms"] = 1e3 * statistics.median(times["plain"])
        row.update({engine: ratio(times, engine, "plain") for engine in ("forward", *ENGINES)})
        row["floor"] = row["forward"] + (1 - row["forward"]) * keep
        row.update(agreement(model, batches, keep))
        row["memory"] = {engine: peak_memory(steps[engine]) for engine in ("exact", "two_pass", "shared")}
        rows.append(row)
        print(
            f"{name:15s} q={keep:.1f} plain {row['plain_ms']:6.0f} ms | "
            + " ".join(f"{engine} {row[engine]:.3f}" for engine in ENGINES)
            + f" (limit {row['limit']:.3f}, floor {row['floor']:.3f}) | error {row['shared_error']:.1e}"
            + f" cosine {row['shared_cosine']:.4f} two_pass {row['two_pass_cosine']:.4f} | MiB "
            + " ".join(f"{engine} {value:.0f}" for engine, value in row["memory"].items()),
            flush=True,
        )
    return {"model": name, "seed": seed, "rows": rows}


def whole_run(steps: int, names: tuple[str, ...], norm: str = "group") -> dict[str, Any]:
    """Time plain training, and trimming on the paper's schedule with each engine, interleaved step by step."""
    torch.manual_seed(0)
    first = resnet18(norm).train()
    networks = {name: copy.deepcopy(first) for name in ("plain", *names)}
    optimizers = {name: torch.optim.SGD(network.parameters(), lr=0.02) for name, network in networks.items()}
    trims = {name: batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=steps) for name in names}
    engines = {name: batchtrim.TrimmedForward(networks[name], classify, trims[name], name) for name in names}
    seconds = dict.fromkeys(networks, 0.0)
    for _ in range(steps):
        x, y = some_images()
        for name, network in networks.items():
            start = time.perf_counter()
            loss = classify(network(x), y).mean() if name == "plain" else engines[name](x, y)
            optimizers[name].zero_grad(set_to_none=True)
            loss.backward()
            optimizers[name].step()
            seconds[name] += time.perf_counter() - start
        for trim in trims.values():
            trim.step()
    ratios = {name: seconds[name] / seconds["plain"] for name in names}
    told = ", ".join(f"{name} {value:.3f}" for name, value in ratios.items())
    print(f"whole run, resnet18-{norm}, {steps} steps, over plain: {told} (limit of auto 0.80)", flush=True)
    return {"norm": norm, "steps": steps, "seconds": seconds, "ratios": ratios, "limit": 0.80}


HUNDRED: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: small("mlp"),
    "cnn": lambda: small("cnn"),
    "resnet8": lambda: small("resnet8"),
    "resnet20": lambda: small("resnet20"),
    "resnet20-refused": lambda: Refused(small("resnet20")),
    "vit": CASES["vit"][0],
    "resnet18-group": CASES["resnet18-group"][0],
}


def first_hundred(name: str, keep: float, steps: int = 100) -> dict[str, Any]:
    """Time auto's first hundred steps, counting and trace included, relative to as many plain ones."""
    torch.manual_seed(0)
    model, (x, y) = HUNDRED[name]().train(), some_images()
    run = {"plain": make_step("plain", model, x, y, keep)}
    for _ in range(3):
        run["plain"]()
    trim = batchtrim.Trimmer(keep)
    auto = batchtrim.TrimmedForward(model, classify, trim, "auto")
    run["auto"] = lambda: (model.zero_grad(set_to_none=True), auto(x, y).backward())  # type: ignore[assignment]
    seconds: dict[str, list[float]] = {"plain": [], "auto": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineFallback)
        for _ in range(steps):
            for engine, step in run.items():
                start = time.perf_counter()
                step()
                seconds[engine].append(time.perf_counter() - start)
    row = {
        "model": name, "keep": keep, "ratio": sum(seconds["auto"]) / sum(seconds["plain"]),
        "later": statistics.median(seconds["auto"][10:]) / statistics.median(seconds["plain"][10:]),
        "plain_ms": 1e3 * statistics.median(seconds["plain"]), "engine": auto.last.engine, "limit": 1.02,
    }  # fmt: skip
    print(
        f"auto, first {steps} steps of {name} at q={keep}: {row['ratio']:.3f} of plain (limit 1.02), "
        f"later {row['later']:.3f}, by '{row['engine']}'; a plain step takes {row['plain_ms']:.1f} ms",
        flush=True,
    )
    return row


def language_model(
    rounds: int,
    batch: int = 4,
    length: int = 128,
    keep: float = 0.5,
    device: torch.device | str = "cpu",
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    **sizes: int,
) -> dict[str, Any]:
    """Measure a GPT-2 of 4 layers that keeps half of its tokens: step time, peak memory, gradient error."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)
    model = GPT2LMHeadModel(config).to(device).train()
    x = torch.randint(0, config.vocab_size, (batch, length), device=device)

    def per_token(outputs: Any, y: Tensor) -> Any:
        return batchtrim.token_losses(outputs.logits, y, shift=True)

    def make(name: str) -> Callable[[], Tensor]:
        trim = batchtrim.Trimmer(keep, unit="element")
        engine = None if name == "plain" else batchtrim.TrimmedForward(model, per_token, trim, name)

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            inputs = {"input_ids": x, "use_cache": False}
            with precision():
                loss = per_token(model(**inputs), x).values.mean() if engine is None else engine(inputs, x)
            loss.backward()
            return loss.detach()

        return step

    steps = {name: make(name) for name in ("plain", "exact", "shared")}
    found = {}
    for name in ("exact", "shared"):
        steps[name]()
        found[name] = gradients(model).double()
    times = interleaved(steps, rounds)
    row: dict[str, Any] = {name: ratio(times, name, "plain") for name in ("exact", "shared")}
    row["plain_ms"] = 1e3 * statistics.median(times["plain"])
    row["error"] = float((found["shared"] - found["exact"]).norm() / found["exact"].norm())
    row["memory"] = {name: peak_memory(step) for name, step in steps.items()}
    told = " ".join(f"{name} {value:.0f}" for name, value in row["memory"].items())
    print(
        f"language model, {batch} x {length} tokens, q={keep}: plain {row['plain_ms']:.0f} ms | "
        f"exact {row['exact']:.3f} shared {row['shared']:.3f} | error {row['error']:.1e} | MiB {told}",
        flush=True,
    )
    return {"batch": batch, "length": length, "keep": keep, **row}


def traces(names: tuple[str, ...]) -> dict[str, float]:
    """Return by how many seconds the shared engine's first step exceeds a plain one: its trace, once per run."""
    seconds = {}
    for name in names:
        build, inputs, _ = CASES[name]
        torch.manual_seed(0)
        model, (x, y) = build().train(), inputs()
        make_step("plain", model, x, y, 0.5)()
        start = time.perf_counter()
        make_step("plain", model, x, y, 0.5)()
        plain = time.perf_counter() - start
        step = make_step("shared", model, x, y, 0.5)
        start = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - start - plain
        print(f"trace of {name}: {seconds[name]:.1f} s (limit 10 for resnet18-group)", flush=True)
    return seconds


def compiled(name: str, keeps: tuple[float, ...], rounds: int) -> list[dict[str, float]]:
    """Time engines on a model that the user compiled, relative to a compiled plain step.

    The steps that compile are not counted: the second of ``shared``; for the others the first, and the first with
    another k. From q = 0.4 on, ``shared`` should take less time than ``two_pass``.
    """
    build, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model, (x, y) = build().train(), inputs()
    model.compile()
    rows = []
    for keep in keeps:
        steps = {engine: make_step(engine, model, x, y, keep) for engine in ("plain", "two_pass", "shared", "auto")}
        for step in steps.values():
            for _ in range(4):
                step()
        times = interleaved(steps, rounds)
        row = {engine: ratio(times, engine, "plain") for engine in steps}
        rows.append({"keep": keep, "limit": (1 + 2 * keep) / 3 + 0.08, **row})
        told = " ".join(f"{engine} {value:.3f}" for engine, value in row.items())
        print(f"compiled {name} q={keep}: {told} (limit {rows[-1]['limit']:.3f})", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__, rounds=15, threads=2)
    parser.add_argument("--models", default=",".join(CASES), help="comma-separated, of: " + ", ".join(CASES))
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)), help="keep fractions")
    parser.add_argument("--seed", type=int, default=0, help="of the networks' weights and the batches")
    parser.add_argument("--run-steps", type=int, default=60, help="steps of the whole run; 0 leaves it out")
    parser.add_argument("--run-engines", default="exact,two_pass,shared,auto", help="engines of the whole runs")
    parser.add_argument("--compiled", default="", help="networks to measure compiled, comma-separated")
    parser.add_argument("--traces", default="resnet18-group", help="networks whose trace is timed, comma-separated")
    parser.add_argument(
        "--hundred", default="mlp,cnn,resnet8", help="networks of auto's first hundred steps, of: " + ", ".join(HUNDRED)
    )
    parser.add_argument("--language-model", action="store_true", help="measure a language model that keeps tokens")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keeps = tuple(float(keep) for keep in options.keeps.split(","))
    results = [measure(name, keeps, options.rounds, options.seed) for name in options.models.split(",") if name]
    extra = {
        "traces": traces(tuple(filter(None, options.traces.split(",")))),
        "compiled": {name: compiled(name, keeps, options.rounds) for name in options.compiled.split(",") if name},
        "language_model": language_model(rounds=options.rounds) if options.language_model else None,
        "first_hundred": [first_hundred(name, q) for name in options.hundred.split(",") if name for q in keeps],
    }
    engines = tuple(options.run_engines.split(","))
    runs = [whole_run(options.run_steps, engines, norm) for norm in ("group", "batch")] if options.run_steps else []
    save(
        options.json,
        {"engines": results, "whole_runs": runs, "batch": BATCH, "rounds": options.rounds, **extra},
    )


if __name__ == "__main__":
    main()
