"""What was kept, sample by sample: times seen and kept, first and last loss, mean and variance, last dropped.

The numbers stay on the device the losses are on, 32 bytes a sample. Batches are held back and entered together a few
dozen at a time, so a step pays for a copy of its losses and little else; nothing waits for the device before
:meth:`KeepLog.end_epoch` or a read. See the guide *See what was kept*.

Legend: n samples in the data set, B batch, P entries held back, C classes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from batchtrim import noise
from batchtrim._checks import check_count, check_integers, check_like, check_losses, check_state, describe, import_extra
from batchtrim.choice import Choice
from batchtrim.noise import NoiseAmplified
from batchtrim.selection import Selection

__all__ = ["KeepLog", "NoiseAmplified", "suspects"]

_STATE_VERSION = 2
_FLUSH_BATCHES = 64
_FLUSH_ENTRIES = 1 << 15
# of an epoch: seen, kept, judged, judged and kept, in doubt, in doubt and kept, out of range; what noise.stays gives
_SUMS = 7 + 6
# name: dtype and value of a sample never seen; 32 bytes in all
_COLUMNS: dict[str, tuple[torch.dtype, float]] = {
    "seen": (torch.int32, 0),
    "kept": (torch.int32, 0),
    "first": (torch.float32, float("nan")),
    "last": (torch.float32, float("nan")),
    "mean": (torch.float32, 0.0),
    "m2": (torch.float32, 0.0),
    "last_dropped": (torch.int32, -1),
    "predicted": (torch.int16, -1),
    "confidence": (torch.float16, float("nan")),
}


class KeepLog:
    """A record of every sample's losses and of whether it was kept.

    After each batch call ``log.record(trim.last, ids=ids)``, after each epoch ``log.end_epoch()``.

    Args:
        n: samples in the data set; ids run from 0 to n - 1.
        classes: C, for the keep rate of each class over time; needs ``labels`` with every batch.
        distributed: gather what all ranks record, so that each rank holds the whole log. Every rank must then record
            the same number of batches, as under DDP, and call :meth:`end_epoch` together.
        warn: warn when trimming seems to amplify label noise (:class:`NoiseAmplified`; ``batchtrim/noise.py`` has the
            two signs); needs ``outputs`` and ``labels``.

    Example:
        >>> log = KeepLog(4)
        >>> choice = Selection(indices=torch.tensor([1]), size=2, candidates=2)
        >>> log.record(Choice(torch.tensor([0.5, 2.0]), choice), ids=torch.tensor([0, 3]))
        >>> log.table()["kept"]
        tensor([0, 0, 0, 1], dtype=torch.int32)
        >>> log
        KeepLog(n=4, 1 batches in 0 epochs)
    """

    def __init__(self, n: int, *, classes: int | None = None, distributed: bool = False, warn: bool = True) -> None:
        self.n = check_count("n", n, hint="It is the number of samples in the data set.")
        self.classes = None if classes is None else check_count("classes", classes)
        self.distributed = distributed
        self.warn = warn
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self._columns = _empty(n + 1, torch.device("cpu"))  # the last row takes what a mask leaves out
        self._pending: list[tuple[Tensor, ...]] = []
        self._entries = 0
        self._epoch = torch.zeros(self._epoch_size, dtype=torch.int64)
        self._warned = False

    def record(
        self,
        last: Chosen | Tensor | None,
        losses: Tensor | None = None,
        selection: Selection | None = None,
        *,
        ids: Tensor | None = None,
        outputs: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch: ``log.record(trim.last, ids=ids)``.

        Args:
            last: what was chosen from what: :attr:`batchtrim.Trimmer.last`, :attr:`batchtrim.TrimmedForward.last`, or
                a :class:`batchtrim.Choice` of your own.
            ids: integers (B,), which samples these are, as row numbers in the data set; one may come twice.
            outputs: (B, C) logits, for the last prediction of each sample and its confidence. Where ``last`` is a
                TrimmedForward's and there are ``labels``, the model's outputs if they are of that form.
            labels: integers (B,); below 0 for none.
            losses, selection, mask: deprecated: ``log.record(ids, losses, selection, mask=mask)``.

        Raises:
            ValueError, TypeError: there was no choice (a compiled step leaves none), or shapes, dtypes, ids or labels
                do not fit. On a device ids are looked at in :meth:`end_epoch`.
        """
        if isinstance(last, Tensor):
            ids, last = _as_before(last, losses, selection, mask)
        elif losses is not None or selection is not None or mask is not None:
            raise TypeError("expected `losses`, `selection` and `mask` inside of `last`, got them beside it.")
        losses, selection, mask = _parts(last)
        if labels is not None and outputs is None:
            outputs = _logits(getattr(last, "outputs", None), len(losses))
        _check_batch(losses, mask, ids, outputs, labels)
        assert ids is not None
        device = losses.device
        rows = ids.to(device, torch.int64, copy=True)
        if rows.is_cpu:  # elsewhere looking would stall the device: end_epoch looks
            self._check_ids(rows if mask is None else rows[mask])
            self._check_labels(labels if mask is None or labels is None else labels[mask])
        if mask is not None:
            rows = torch.where(mask, rows, self.n)
        nothing = torch.full_like(rows, -1, dtype=torch.int16)
        predicted, confidence = nothing, nothing.to(torch.float16)
        if outputs is not None:
            top, predicted = outputs.detach().float().softmax(-1).max(-1)
            confidence, predicted = top.to(torch.float16), predicted.to(torch.int16)
        label = nothing if labels is None else labels.to(device, torch.int16)
        step = torch.full_like(rows, self.steps, dtype=torch.int32)
        values = losses.detach().to(torch.float32, copy=True)
        self._pending.append((rows, values, selection.mask(), step, predicted, confidence, label))
        self._entries += len(rows)
        self.steps += 1
        if len(self._pending) >= _FLUSH_BATCHES or (self._entries >= _FLUSH_ENTRIES and not self.distributed):
            self._flush()

    def end_epoch(self) -> dict[str, Any]:
        """Close an epoch: enter what is held back, add a line to ``history``, warn if noise is being amplified.

        Returns:
            The line: ``steps`` so far; ``seen``, ``kept`` in the epoch; ``keep``: their ratio; ``doubt``,
            ``doubt_kept``: part of all samples and of the kept ones whose label is contradicted by one of the surest
            quarter of the predictions (None without outputs and labels); ``stay_hard``, ``stay_easy``: parts of the
            hardest and easiest tenth, by each sample's loss before, that are so again (None in the first epoch);
            ``compared``: how many that hardest tenth was; ``hard_kept``: part of the hardest tenth that is kept;
            ``class_seen``, ``class_kept``: lists of C counts, where asked for.

        Raises:
            ValueError: an id was out of range on a device where looking at once would have stalled it.
        """
        self._flush()
        sums = self._epoch.tolist()
        seen, kept, judged, judged_kept, doubt, doubt_kept, outside = sums[:7]
        hard_before, hard_again, easy_before, easy_again, hard, hard_kept = sums[7:_SUMS]
        if outside:
            raise ValueError(f"expected `ids` from 0 to {self.n - 1}, got {outside} others since the last epoch.")
        line: dict[str, Any] = {
            "steps": self.steps,
            "seen": seen,
            "kept": kept,
            "keep": _ratio(kept, seen),
            "doubt": _ratio(doubt, judged),
            "doubt_kept": _ratio(doubt_kept, judged_kept),
            "stay_hard": _ratio(hard_again, hard_before),
            "stay_easy": _ratio(easy_again, easy_before),
            "compared": hard_before,
            "hard_kept": _ratio(hard_kept, hard),
        }
        if self.classes:
            counts = sums[_SUMS:]
            line |= {"class_seen": counts[: self.classes], "class_kept": counts[self.classes :]}
        self.history.append(line)
        self._epoch.zero_()
        self._warn_of_noise()
        return line

    def table(self) -> dict[str, Tensor]:
        """All samples, on the CPU: seen, kept, keep_rate, first, last, mean, variance, last_dropped and the rest.

        Losses of samples never seen are NaN; ``last_dropped`` is the number of the batch, -1 for never; ``predicted``
        is -1 and ``confidence`` NaN where no outputs were given. ``variance`` divides by the times seen.
        """
        self._check_nothing_apart()
        self._flush()
        columns = {name: column[: self.n].cpu() for name, column in self._columns.items()}
        seen = columns["seen"]
        never = torch.where(seen > 0, 0.0, float("nan"))
        columns["keep_rate"] = columns["kept"] / seen  # 0 / 0 is NaN
        columns["mean"] = columns["mean"] + never
        columns["variance"] = columns.pop("m2").double() / seen
        return columns

    def merge(self, later: KeepLog) -> None:
        """Add another log of the same data set, as if its batches had been recorded after this one's."""
        if later.n != self.n:
            raise ValueError(
                f"expected a log of {self.n} samples, got one of {later.n}. Ids must mean the same samples."
            )
        self._flush()
        later._flush()
        mine = self._columns
        theirs = {name: column.to(mine["seen"].device) for name, column in later._columns.items()}
        there = theirs["seen"] > 0
        mean, m2 = _combine(mine, theirs["seen"], theirs["mean"], theirs["m2"])
        self._columns = {
            "seen": mine["seen"] + theirs["seen"],
            "kept": mine["kept"] + theirs["kept"],
            "first": torch.where(mine["seen"] > 0, mine["first"], theirs["first"]),
            "last": torch.where(there, theirs["last"], mine["last"]),
            "mean": torch.where(there, mean, mine["mean"]),
            "m2": torch.where(there, m2, mine["m2"]),
            "last_dropped": torch.where(
                theirs["last_dropped"] >= 0, theirs["last_dropped"] + self.steps, mine["last_dropped"]
            ),
            "predicted": torch.where(theirs["predicted"] >= 0, theirs["predicted"], mine["predicted"]),
            "confidence": torch.where(theirs["predicted"] >= 0, theirs["confidence"], mine["confidence"]),
        }
        self.history += [{**line, "steps": line["steps"] + self.steps} for line in later.history]
        self.steps += later.steps

    def state_dict(self) -> dict[str, Any]:
        """Everything; tensors, numbers and strings only. A run that loads it goes on as if it had never stopped."""
        self._check_nothing_apart()
        return {
            "version": _STATE_VERSION,
            "n": self.n,
            "classes": self.classes,
            "steps": self.steps,
            "columns": {name: column.cpu() for name, column in self._columns.items()},
            "pending": [[part.cpu() for part in batch] for batch in self._pending],
            "epoch": self._epoch.cpu(),
            "history": [dict(line) for line in self.history],
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: the state is of a log with another n or other classes, or of another version.
        """
        check_state(state, ("version",), "a KeepLog")
        if state["version"] != _STATE_VERSION:
            raise ValueError(
                f"expected `state` of version {_STATE_VERSION}, got {state['version']}. Another batchtrim saved it."
            )
        names = ("n", "classes", "steps", "columns", "pending", "epoch", "history", "warned")
        check_state(state, names, "a KeepLog")
        check_state(state["columns"], _COLUMNS, "a KeepLog's columns")
        for name in ("n", "classes"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"expected `state` of a log with {name}={getattr(self, name)}, got {name}={state[name]}. "
                    "Make the log with the saved number."
                )
        self._pending = [tuple(batch) for batch in state["pending"]]
        self._entries = sum(len(batch[0]) for batch in self._pending)
        self.steps = int(state["steps"])
        self._columns = {name: column.clone() for name, column in state["columns"].items()}
        self._epoch = state["epoch"].clone()
        self.history = [dict(line) for line in state["history"]]
        self._warned = bool(state["warned"])

    def to_parquet(self, path: str | Path, **columns: Any) -> None:
        """Write :meth:`table` with an ``id`` column, more ``columns`` of n values, and the history as metadata.

        Raises:
            InstallExtra: pyarrow is missing.
        """
        arrow = import_extra("pyarrow", "lab", "KeepLog.to_parquet")
        parquet = import_extra("pyarrow.parquet", "lab", "KeepLog.to_parquet")
        table = {"id": torch.arange(self.n), **self.table()}
        arrays = {name: column.numpy() for name, column in table.items()} | columns
        known = {"version": _STATE_VERSION, "classes": self.classes, "steps": self.steps, "history": self.history}
        built = arrow.table(arrays)
        parquet.write_table(built.replace_schema_metadata({"batchtrim": json.dumps(known)}), path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> KeepLog:
        """Read what :meth:`to_parquet` wrote, all but the added columns.

        Raises:
            ValueError: the file is of another kind, or damaged. InstallExtra: pyarrow is missing.
        """
        parquet = import_extra("pyarrow.parquet", "lab", "KeepLog.from_parquet")
        try:
            found = parquet.read_table(path)
            known = json.loads(found.schema.metadata[b"batchtrim"])
            log = cls(found.num_rows, classes=known["classes"])
            log.steps = check_count("steps", known["steps"], minimum=0)
            log.history = [dict(line) for line in known["history"]]
            table = {name: torch.from_numpy(found[name].to_numpy().copy()) for name in _READ}
            table["m2"] = torch.nan_to_num(table.pop("variance") * table["seen"])
            table["mean"] = torch.where(table["seen"] > 0, table["mean"], 0.0)
            for name, (dtype, _) in _COLUMNS.items():
                log._columns[name][: log.n] = table[name].to(dtype)
        except FileNotFoundError:
            raise
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise ValueError(
                f"expected a file that KeepLog.to_parquet wrote, got {str(path)!r} ({type(error).__name__}: {error})."
            ) from error
        return log

    def __repr__(self) -> str:
        return f"KeepLog(n={self.n}, {self.steps} batches in {len(self.history)} epochs)"

    def _check_nothing_apart(self) -> None:
        if self.distributed and self._pending:
            raise RuntimeError(
                "expected nothing held back when a distributed log is read. Call end_epoch() on every rank."
            )

    def _check_ids(self, ids: Tensor) -> None:
        if not len(ids):
            return
        low, high = (int(edge) for edge in ids.aminmax())
        if low < 0 or high >= self.n:
            raise ValueError(
                f"expected `ids` from 0 to {self.n - 1}, got some from {low} to {high}. "
                "They are row numbers of the data set the log was made for."
            )

    def _check_labels(self, labels: Tensor | None) -> None:
        if labels is None or not self.classes or not len(labels):
            return
        largest = int(labels.max())  # one below 0 is no label
        if largest >= self.classes:
            raise ValueError(
                f"expected `labels` from 0 to {self.classes - 1}, got {largest}. "
                f"The log was made with classes={self.classes}."
            )

    @property
    def _epoch_size(self) -> int:
        return _SUMS + 2 * (self.classes or 0)  # then both counts by class

    def _flush(self) -> None:
        """Enter all batches held back. No data-dependent shape, so no wait for the device."""
        if not self._pending:
            return
        device = self._pending[-1][0].device  # batches of a loaded state lie on the CPU
        rows, losses, kept, steps, predicted, confidence, labels = self._gathered(
            tuple(torch.cat([part.to(device) for part in parts]) for parts in zip(*self._pending, strict=True))
        )
        self._pending, self._entries = [], 0
        if self._columns["seen"].device != rows.device:
            self._columns = {name: column.to(rows.device) for name, column in self._columns.items()}
            self._epoch = self._epoch.to(rows.device)
        outside = (rows < 0) | (rows > self.n)
        rows = torch.where(outside, self.n, rows)
        self._count(rows < self.n, kept, predicted, confidence, labels, outside)
        # Sort by sample, in the order recorded: the entries of a sample stand from `start` to `end`.
        rows, order = torch.sort(rows, stable=True)
        start = torch.searchsorted(rows, rows)
        end = torch.searchsorted(rows, rows, right=True) - 1
        losses, kept, steps, predicted, confidence = (
            part[order] for part in (losses, kept, steps, predicted, confidence)
        )

        def total(values: Tensor) -> Tensor:
            """Sum over the entries of each sample, given to every one of them."""
            return torch.zeros_like(values).index_add_(0, start, values)[start]

        count = (end - start + 1).to(torch.int32)
        mean = total(losses) / count
        m2 = total((losses - mean) ** 2)

        def largest(values: Tensor) -> Tensor:
            """Likewise the largest, at least -1."""
            return torch.full_like(values, -1).scatter_reduce_(0, start, values, "amax")[start]

        place = torch.arange(len(rows), device=rows.device)
        judged = largest(torch.where(predicted >= 0, place, -1))
        dropped = largest(torch.where(kept, -1, steps))
        mine = {name: column[rows] for name, column in self._columns.items()}
        compared = (mine["seen"] > 0) & (rows < self.n)
        self._epoch[7:_SUMS] += noise.stays(mine["last"], losses, compared, kept)
        mean, m2 = _combine(mine, count, mean, m2)
        new = {
            "seen": mine["seen"] + count,
            "kept": mine["kept"] + total(kept.to(torch.int32)),
            "first": torch.where(mine["seen"] > 0, mine["first"], losses[start]),
            "last": losses[end],
            "mean": mean,
            "m2": m2,
            "last_dropped": torch.maximum(mine["last_dropped"], dropped),
            "predicted": torch.where(judged >= 0, predicted[judged], mine["predicted"]),
            "confidence": torch.where(judged >= 0, confidence[judged], mine["confidence"]),
        }
        for name, values in new.items():  # entries of one sample write the same value
            self._columns[name][rows] = values

    def _count(
        self, counts: Tensor, kept: Tensor, predicted: Tensor, confidence: Tensor, labels: Tensor, outside: Tensor
    ) -> None:
        """Sums of the epoch; entries that a mask left out do not count."""
        kept = kept & counts
        judged = counts & (predicted >= 0) & (labels >= 0)
        doubt = judged & (predicted != labels) & noise.surest(confidence, judged)
        parts = [counts, kept, judged, judged & kept, doubt, doubt & kept, outside]
        self._epoch[: len(parts)] += torch.stack([part.sum() for part in parts])
        if self.classes:
            by_class = self._epoch.new_zeros(2, self.classes + 1)
            slot = torch.where(counts & (labels >= 0) & (labels < self.classes), labels, self.classes).long()
            by_class[0].index_add_(0, slot, counts.long())
            by_class[1].index_add_(0, slot, kept.long())
            self._epoch[_SUMS:] += by_class[:, :-1].flatten()

    def _gathered(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The entries of all ranks, in the order of steps and then of ranks."""
        from torch import distributed

        if not self.distributed or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return parts
        world = distributed.get_world_size()
        device = parts[0].device
        size = torch.tensor([len(parts[0])], device=device)
        sizes = [torch.zeros_like(size) for _ in range(world)]
        distributed.all_gather(sizes, size)
        most = int(torch.cat(sizes).max())
        whole = []
        for part in parts:
            # gloo and NCCL know neither int16 nor bool everywhere; doubles hold every value here exactly
            padded = torch.zeros(most, dtype=torch.float64, device=device)
            padded[: len(part)] = part.double()
            found = [torch.zeros_like(padded) for _ in range(world)]
            distributed.all_gather(found, padded)
            whole.append(torch.cat([each[: int(n)] for each, n in zip(found, sizes, strict=True)]).to(part.dtype))
        order = torch.argsort(whole[3], stable=True)
        return tuple(part[order] for part in whole)

    def _warn_of_noise(self) -> None:
        sign = noise.sign(self.history) if self.warn and not self._warned else None
        if sign is None:
            return
        self._warned = True
        keep = self.history[-1]["keep"]
        warnings.warn(
            f"{sign}: with keep at {keep:.2g} trimming trains ever more on what look like wrong labels. Look "
            "at them with batchtrim.suspects(log), and leave out the very hardest with "
            "Trimmer(select=batchtrim.between(skip=...)), which is two_sided in the lab.",
            NoiseAmplified,
            stacklevel=3,
        )


class Chosen(Protocol):
    """A :class:`batchtrim.Choice`, or another object with ``losses``, ``selection`` and, where it has one, ``mask``."""

    @property
    def losses(self) -> Tensor: ...

    @property
    def selection(self) -> Selection: ...


def _as_before(
    ids: Tensor, losses: Tensor | None, selection: Selection | None, mask: Tensor | None
) -> tuple[Tensor, Choice]:
    if losses is None or selection is None:
        raise TypeError(f"expected `last` to be what was chosen, such as `trim.last`, got {describe(ids)}.")
    message = "record(ids, losses, selection) goes in the next release: record(Choice(losses, selection), ids=ids)."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return ids, Choice(losses, selection, mask)


def _parts(last: Any) -> tuple[Tensor, Selection, Tensor | None]:
    """Losses, selection and mask of what was chosen last."""
    if last is None:
        raise ValueError(
            "expected `last` to be what was chosen, got None. Record after the trimmer was called; a compiled step "
            "leaves no choice to record."
        )
    losses, selection = getattr(last, "losses", None), getattr(last, "selection", None)
    if not isinstance(losses, Tensor) or not isinstance(selection, Selection):
        raise TypeError(f"expected `last` to have losses and a selection, as `trim.last` has, got {describe(last)}.")
    check_losses(losses, allow_empty=True)
    if selection.size != len(losses):
        raise ValueError(
            f"expected `last.selection` to be of {len(losses)} losses, got one of {selection.size}. "
            "Losses and selection are of different batches."
        )
    return losses, selection, getattr(last, "mask", None)


def _check_batch(losses: Tensor, mask: Tensor | None, ids: Any, outputs: Tensor | None, labels: Tensor | None) -> None:
    """Shapes and dtypes of what is recorded beside the losses."""
    if ids is None:
        raise ValueError(
            "expected `ids`, the samples' row numbers in the data set, got None. Let the data set return its index."
        )
    check_integers("ids", ids, losses)
    if labels is not None:
        check_integers("labels", labels, losses)
    if mask is not None:
        check_like("mask", mask, losses, torch.bool)
    if outputs is not None:
        check_losses(outputs, "outputs", allow_empty=True)
        if outputs.ndim != 2 or outputs.shape[0] != len(losses) or not outputs.shape[1]:
            raise ValueError(f"expected `outputs` to have shape ({len(losses)}, C), got {tuple(outputs.shape)}.")


def _logits(outputs: Any, size: int) -> Tensor | None:
    """A model's outputs where they are (B, C) logits, by themselves or as ``logits``; else nothing to record."""
    if not isinstance(outputs, Tensor):
        outputs = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    fits = isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) == size and outputs.shape[1] > 1
    return outputs if fits and outputs.dtype.is_floating_point else None


def suspects(log: KeepLog, *, top: int | None = None) -> tuple[Tensor, Tensor]:
    """Samples by how likely their label is wrong, judged by how hard they stayed and how often they were kept.

    ``score = keep_rate * mean_loss``, given as its rank among all samples. Where nothing was ever dropped that is the
    order of the mean loss over training, the area under the loss curve.

    Args:
        top: only so many.

    Returns:
        ids int64 and scores in [0, 1], most suspect first. Samples never seen are left out; a NaN loss comes first.

    Notes:
        A high score says hard, and rare or ambiguous samples are hard as well: look before you drop. How it compares
        with other scores on real label noise is measured in ``studies/label_errors.py``.

    Example:
        >>> log = KeepLog(3)
        >>> kept = Selection(torch.tensor([1, 2]), size=3, candidates=3)
        >>> log.record(Choice(torch.tensor([0.1, 2.0, 0.4]), kept), ids=torch.arange(3))
        >>> suspects(log, top=2)
        (tensor([1, 2]), tensor([1.0000, 0.5000]))
    """
    table = log.table()
    ids = torch.nonzero(table["seen"] > 0).flatten()
    score = _ranks(table["keep_rate"][ids] * table["mean"][ids])
    order = torch.argsort(score, descending=True, stable=True)[:top]
    return ids[order], score[order]


def _empty(n: int, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.full((n,), fill, dtype=dtype, device=device) for name, (dtype, fill) in _COLUMNS.items()}


_READ = {*_COLUMNS, "variance"} - {"m2"}


def _combine(mine: dict[str, Tensor], count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of two sets of losses (Chan, Golub and LeVeque 1979)."""
    both = (mine["seen"] + count).clamp(min=1)
    apart = mean - mine["mean"]
    share = count / both
    return mine["mean"] + apart * share, mine["m2"] + m2 + apart**2 * mine["seen"] * share


def _ranks(values: Tensor) -> Tensor:
    """Each value's rank in [0, 1], ties at their mean rank; NaN ranks highest."""
    values = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    ordered = torch.sort(values).values
    low = torch.searchsorted(ordered, values)
    high = torch.searchsorted(ordered, values, right=True) - 1
    return (low + high) / 2 / max(1, len(values) - 1)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
