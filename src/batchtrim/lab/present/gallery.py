"""The gallery: one self-contained page with the hardest samples, a map, confusions and classes over time.

:func:`build` makes it from a folder of runs with a keep log (``batchtrim show``), :func:`write` from a log and
samples of your own: images, or rows of text or fields.

n samples, C classes, S samples with a thumbnail.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from batchtrim._checks import import_extra
from batchtrim._deprecated import renamed
from batchtrim.keeplog import KeepLog, suspects
from batchtrim.lab import records
from batchtrim.lab.files import write_whole, writing
from batchtrim.lab.present import charts, formats
from batchtrim.lab.present.charts import Series
from batchtrim.lab.present.chosen_run import choose, found_again, remembered
from batchtrim.lab.present.report import Tile
from batchtrim.lab.present.templating import render
from batchtrim.lab.run import loading
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.samples import checked_images, checked_labels, checked_rows
from batchtrim.lab.run.task_config import TaskConfig

__all__ = ["Samples", "build", "write"]

PER_CLASS = 200  # the hardest samples per class that get a thumbnail or a row of text
MOST_SHOWN = 6000  # of them in total, so that a page of a thousand classes stays small
MOST_SUSPECTS = 500
SHEET_SIDE = 20  # thumbnails on a side of a sprite sheet
THUMB = 64  # longest side of a thumbnail; smaller images are not scaled
MOST_LINES = 12  # classes drawn as separate lines
LONGEST_TEXT = 400
NO_CLASSES = ("all samples",)
ORDERS = (
    ("mean", "mean loss"),
    ("score", "suspicion"),
    ("last", "last loss"),
    ("spread", "spread"),
    ("keep", "keep rate"),
)

DRAWN = ("random", "loss_mass_random", "data_dropout_matched", "data_dropout_scalar")
"""Methods that choose the kept samples at random."""


@renamed("pictures", "images")
@dataclass(frozen=True)
class Samples:
    """The samples that the log's ids refer to.

    Args:
        labels: int (n,), as trained on.
        classes: their C names. Omit both for samples without a class, as in regression.
        images: uint8 (n, channels, H, W), one or three channels; or
        rows: a text for each sample, or a mapping of field names to values.
        predicted, confidence: (n,), class and probability, if the log's own (from the last visit in training, with
            augmentation) should not be used.
        title: heading of the page.
        facts: settings to print at the bottom.
        random: the kept samples were drawn at random, so keep rates say nothing about them.
    """

    labels: Tensor | None = None
    classes: Sequence[str] = ()
    images: Tensor | None = None
    rows: Sequence[str | Mapping[str, Any]] | None = None
    predicted: Tensor | None = None
    confidence: Tensor | None = None
    title: str = "What was kept"
    facts: Mapping[str, str] | None = None
    random: bool = False


def build(
    run: str | Path,
    out: str | Path | None = None,
    *,
    key: str | None = None,
    method: str | None = None,
    seed: int | None = None,
    data_dir: str | None = None,
) -> Path:
    """Write the gallery of a run with a keep log, and return the page's path.

    Args:
        run: the folder that holds ``runs.jsonl`` and ``keep/KEY.parquet``.
        out: the page, by default ``keep/KEY.html`` in that folder.
        key, method, seed: which run; see :func:`batchtrim.lab.present.chosen_run.choose`.
        data_dir: the folder of data sets; by default where the runs found them.

    Raises:
        ValueError: the folder has no keep log, or none with that key.
    """
    folder = Path(run).parent if Path(run).name == "runs.jsonl" else Path(run)
    rows = records.read(folder)
    logged = [row for row in rows if (folder / "keep" / f"{row['key']}.parquet").exists()]
    if not logged:
        own = any("task" in row["config"] for row in rows)
        cure = "Let the function call run.keep_log(n), and run it" if own else "Train with --keep-log,"
        raise ValueError(f"expected a keep log in {folder / 'keep'}, found none. {cure} into a new folder.")
    row = choose(logged, key=key, method=method, seed=seed)
    path = folder / "keep" / f"{row['key']}.parquet"
    out = out or path.with_suffix(".html")
    facts = {name: str(value) for name, value in row["config"].items() if value not in (None, {})}
    if "task" in row["config"]:
        return write(KeepLog.from_parquet(path), _told_by_the_task(path, row, facts), out)
    config = RunConfig.from_dict(row["config"])
    images = loading.load_images(found_again(config), data_dir or remembered(folder))
    samples = Samples(
        labels=images.train_labels,
        classes=images.class_names or _class_names(config.dataset, images.classes),
        images=images.train_images,
        title=f"What was kept: {config.label}",
        facts=facts,
        random=config.method in DRAWN,
    )
    return write(KeepLog.from_parquet(path), samples, out)


def _told_by_the_task(path: Path, row: Mapping[str, Any], facts: Mapping[str, str]) -> Samples:
    """Return the samples that a training function described with ``run.show``."""
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"expected {path.with_suffix('.json')} with what the samples are, got nothing there. Let the task say it: "
            "run.show(rows=...) or run.show(images=...)."
        ) from error
    pixels = path.with_suffix(".npy")
    return Samples(
        labels=None if told["labels"] is None else torch.tensor(told["labels"]),
        classes=told["classes"],
        images=torch.from_numpy(np.load(pixels, allow_pickle=False)) if pixels.exists() else None,
        rows=told["rows"],
        title=f"What was kept: {TaskConfig.from_dict(row['config']).label}",
        facts=facts,
        random=row["config"]["method"] in DRAWN,
    )


def write(log: KeepLog, samples: Samples, out: str | Path) -> Path:
    """Write the page of ``log`` over ``samples`` to ``out``.

    Raises:
        ValueError: log and samples differ in length, or there are neither images nor rows to show.
    """
    by_class = samples.labels is not None
    if samples.labels is None:
        none = torch.full((log.n,), -1)
        samples = replace(samples, labels=torch.zeros(log.n, dtype=torch.int64), classes=NO_CLASSES, predicted=none)
    assert samples.labels is not None
    if len(samples.labels) != log.n:
        raise ValueError(f"expected {log.n} labels, one per sample of the log, got {len(samples.labels)}.")
    if (samples.images is None) == (samples.rows is None):
        got = "neither" if samples.rows is None else "both"
        raise ValueError(f"expected either `images` or `rows` of the samples, got {got}.")
    for name in ("images", "rows", "predicted", "confidence"):
        value = getattr(samples, name)
        if value is not None and len(value) != log.n:
            raise ValueError(f"expected `{name}` of {log.n} samples, got {len(value)}.")
    labels = checked_labels(samples.labels, samples.classes)
    if samples.images is not None:
        checked_images(samples.images)
    samples = replace(
        samples,
        labels=torch.tensor(labels, dtype=torch.int64),
        rows=None if samples.rows is None else checked_rows(samples.rows),
    )
    columns = _columns(log, samples)
    shown = _shown(columns, len(samples.classes))
    data: dict[str, Any] = {
        "classes": list(samples.classes),
        "n": len(columns["id"]),
        "columns": {name: _packed(values) for name, values in columns.items()},
        "shown": _packed(shown.astype(np.uint32)),
        "scale": {"loss": _loss_scale(columns)},
    }
    sheets: list[str] = []
    if samples.images is not None:
        sheets, data["thumb"] = _sheets(samples.images[torch.from_numpy(columns["id"][shown].astype(np.int64))])
        data["sheets"] = len(sheets)
    else:
        assert samples.rows is not None
        data["rows"] = [_fields(samples.rows[int(i)]) for i in columns["id"][shown]]
    page = render(
        "gallery.html",
        title=samples.title,
        sheets_css=Markup("".join(f".t{i}{{background-image:url({sheet})}}" for i, sheet in enumerate(sheets))),
        by_class=by_class,
        random=samples.random,
        numbers=_numbers(log, columns) if by_class else _numbers(log, columns)[:-1],
        shown=f"{len(shown):,}",
        classes=list(enumerate(samples.classes)),
        orders=ORDERS,
        history=_class_history(log, samples.classes) if by_class else None,
        facts=samples.facts,
        # no tag inside the script: neither </script> nor <!--<script>, which makes a browser ignore the closing tag
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
    )
    path = Path(out)
    with writing(path, "The runs are unchanged. Pass a writable page: --out PAGE."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(page.encode()))
    return path


def _columns(log: KeepLog, samples: Samples) -> dict[str, np.ndarray]:
    """Return the page's data on each sample seen, most suspect first, packed into few bytes."""
    assert samples.labels is not None
    table = log.table()
    ids, scores = suspects(log)
    predicted = table["predicted"] if samples.predicted is None else samples.predicted
    confidence = table["confidence"] if samples.confidence is None else samples.confidence
    return {
        "id": ids.numpy().astype(np.uint32),
        "label": _classes(samples.labels[ids]),
        "predicted": _classes(predicted[ids]),
        "confidence": _percent(confidence[ids].float()),
        "keep": _percent(table["keep_rate"][ids]),
        "score": _percent(scores),
        "seen": table["seen"][ids].numpy().clip(0, 65535).astype(np.uint16),
        "mean": table["mean"][ids].numpy().astype(np.float32),
        "spread": table["variance"][ids].sqrt().numpy().astype(np.float32),
        "last": table["last"][ids].numpy().astype(np.float32),
    }


def _classes(values: Tensor) -> np.ndarray:
    """Return classes in two bytes each, or in four if there are too many for two."""
    fits = not (values > np.iinfo(np.int16).max).any()
    return values.cpu().numpy().astype(np.int16 if fits else np.int32)


def _percent(values: Tensor) -> np.ndarray:
    """Return fractions as 200ths in a byte; 255 if unknown."""
    known = (values * 200).round().clamp(0, 200).nan_to_num(255)
    return known.cpu().numpy().astype(np.uint8)


def _shown(columns: dict[str, np.ndarray], classes: int) -> np.ndarray:
    """Return the positions of the samples to show: the hardest per class by mean loss, and the most suspect overall."""
    each = min(PER_CLASS, max(4, MOST_SHOWN // max(1, classes)))
    order = np.argsort(-np.nan_to_num(columns["mean"], nan=np.inf), kind="stable")
    labels = columns["label"][order]
    chosen = [order[labels == label][:each] for label in np.unique(labels)]
    chosen.append(np.arange(min(MOST_SUSPECTS, len(order))))
    return np.unique(np.concatenate(chosen))


def _loss_scale(columns: dict[str, np.ndarray]) -> float:
    """Return a loss that nearly all samples are below, so that a few outliers do not compress the map."""
    mean = columns["mean"][np.isfinite(columns["mean"])]
    return float(np.quantile(mean, 0.999)) or 1.0 if len(mean) else 1.0


def _packed(values: np.ndarray) -> dict[str, str]:
    kinds = {"u1": "Uint8", "u2": "Uint16", "i2": "Int16", "i4": "Int32", "u4": "Uint32", "f4": "Float32"}
    little = values.astype(values.dtype.newbyteorder("<"))
    return {"type": kinds[values.dtype.str[1:]] + "Array", "data": base64.b64encode(little.tobytes()).decode()}


def _sheets(images: Tensor) -> tuple[list[str], dict[str, int]]:
    """Return sprite sheets of (S, channels, H, W) as data URLs, and the size of a thumbnail on them."""
    image = import_extra("PIL.Image", "lab", "the gallery")
    count, channels, height, width = images.shape
    shrink = min(1.0, THUMB / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    per_sheet = SHEET_SIDE * SHEET_SIDE
    sheets = []
    for first in range(0, count, per_sheet):
        part = images[first : first + per_sheet]
        rows = math.ceil(len(part) / SHEET_SIDE)
        if shrink < 1.0:
            part = torch.nn.functional.interpolate(part.float(), size=size[::-1], mode="area").round().to(torch.uint8)
        padded = torch.zeros(rows * SHEET_SIDE, channels, size[1], size[0], dtype=torch.uint8)
        padded[: len(part)] = part
        grid = padded.view(rows, SHEET_SIDE, channels, size[1], size[0]).permute(0, 3, 1, 4, 2)
        pixels = grid.reshape(rows * size[1], SHEET_SIDE * size[0], channels).numpy()
        sheet = image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        out = io.BytesIO()
        sheet.save(out, "WEBP", quality=82, method=4)
        sheets.append("data:image/webp;base64," + base64.b64encode(out.getvalue()).decode())
    return sheets, {"width": size[0], "height": size[1], "side": SHEET_SIDE}


def _fields(row: str | Mapping[str, Any]) -> list[list[str]]:
    """Return a sample that is not an image, as names and values; a plain text has an empty name."""
    pairs = [("", row)] if isinstance(row, str) else row.items()
    return [[str(name), text if len(text := str(value)) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"]
            for name, value in pairs]  # fmt: skip


def _numbers(log: KeepLog, columns: dict[str, np.ndarray]) -> list[Tile]:
    """Return the numbers at the top of the page."""
    table = log.table()
    seen, kept = int(table["seen"].sum()), int(table["kept"].sum())
    never_dropped = int((table["kept"] == table["seen"])[table["seen"] > 0].sum())
    predicted = columns["predicted"] >= 0
    wrong = (columns["predicted"] != columns["label"]) & predicted
    return [
        Tile(f"{len(columns['id']):,}", "samples seen"),
        Tile(f"{100 * kept / max(1, seen):.0f} %", "kept, over the whole training"),
        Tile(f"{never_dropped:,}", "never dropped once"),
        Tile(
            f"{int(wrong.sum()):,}" if predicted.any() else formats.UNKNOWN,
            "predicted as another class when last seen",
        ),
    ]


def _class_history(log: KeepLog, classes: Sequence[str]) -> dict[str, Any]:
    """Return the keep rate of each class over epochs; of many classes, those kept least and most at the end."""
    lines = [line for line in log.history if line.get("class_seen")]
    if not lines:
        return {"note": "The log was made without classes, so this was not recorded.", "chart": None}
    seen, kept = (np.array([line[name] for line in lines], dtype=float) for name in ("class_seen", "class_kept"))
    rate = np.divide(kept, seen, out=np.full_like(kept, np.nan), where=seen > 0)
    chosen = list(range(len(classes)))
    note = "A class whose line falls away from the others is being starved."
    if len(chosen) > MOST_LINES:
        last = np.nan_to_num(rate[-1], nan=-1.0)
        order = [int(i) for i in np.argsort(last, kind="stable")]
        chosen = order[: MOST_LINES // 2] + order[-(MOST_LINES // 2) :]
        note += f" Of {len(classes)} classes, the six kept least at the end and the six kept most."
    series = [_class_line("all samples", 0, kept.sum(1) / np.maximum(seen.sum(1), 1))]
    series += [_class_line(str(classes[c]), 1 + i, rate[:, c]) for i, c in enumerate(chosen)]
    chart = charts.lines(
        series, x_label="epoch", y_label="kept %", fmt=lambda v: f"{100 * v:.0f}", y_range=(0.0, 1.05),
        title="Keep rate of each class over epochs",
    )  # fmt: skip
    return {"note": note, "chart": chart, "legend": charts.legend([(each.label, each.style) for each in series])}


def _class_line(label: str, style: int, rate: np.ndarray) -> Series:
    known = np.isfinite(rate)
    return Series(label, style, (np.flatnonzero(known) + 1).tolist(), rate[known].tolist())


def _class_names(dataset: str, classes: int) -> list[str]:
    names = CLASS_NAMES.get(dataset)
    return list(names) if names else [str(i) for i in range(classes)]


CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion_mnist": (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip
