"""The log itself. See the guide *See what was kept*.

The numbers stay on the device of the losses, 32 bytes per sample. Batches are buffered and entered a few dozen at a
time, so a step costs a copy of its losses and little else. Nothing waits for the device before
:meth:`KeepLog.end_epoch` or a read.

Legend: n samples in the data set, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchtrim import noise
from batchtrim._attributes import Checked, fixed
from batchtrim._by_name import by_name
from batchtrim._checks import check_count, check_flag, describe
from batchtrim.distributed import world_size
from batchtrim.keeplog import batch as batches
from batchtrim.keeplog import columns, epoch, exchange, parquet
from batchtrim.keeplog import state as states
from batchtrim.keeplog.batch import ChoiceLike, Entries
from batchtrim.selection import Selection

__all__ = ["KeepLog"]

_FLUSH_BATCHES = 64
_FLUSH_ENTRIES = 1 << 15
# Columns are changed in place, which those made in inference mode would refuse outside of it.
_plain_mode = torch.inference_mode(False)


class KeepLog:
    """A record of every sample's losses and of how often it was kept.

    After each batch call ``log.record(trim.last, ids=ids)``, after each epoch ``log.end_epoch()``.

    Args:
        n: samples in the data set; ids run from 0 to n - 1.
        classes: C, for the keep rate of each class over time; needs ``labels`` with every batch.
        distributed: gather the records of all ranks, so that each rank holds the whole log. Every rank must then record
            the same number of batches, as under DDP, and call :meth:`end_epoch` together.
        warn: warn when trimming seems to amplify label noise (:class:`NoiseAmplified`; ``batchtrim/noise.py`` has the
            two signs); needs ``outputs`` and ``labels``.

    Example:
        >>> from batchtrim import Choice, Selection
        >>> log = KeepLog(4)
        >>> choice = Selection(indices=torch.tensor([1]), size=2, candidates=2)
        >>> log.record(Choice(torch.tensor([0.5, 2.0]), choice), ids=torch.tensor([0, 3]))
        >>> log.table()["kept"]
        tensor([0, 0, 0, 1], dtype=torch.int32)
        >>> log
        KeepLog(n=4, 1 batches in 0 epochs)
    """

    distributed, warn = Checked[bool](check_flag), Checked[bool](check_flag)
    _to_change = "Make a new KeepLog."

    @by_name
    @_plain_mode
    def __init__(self, n: int, *, classes: int | None = None, distributed: bool = False, warn: bool = True) -> None:
        self._n = check_count("n", n, hint="It is the number of samples in the data set.")
        self._classes = None if classes is None else batches.check_classes(classes)
        self.distributed = distributed
        self.warn = warn
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self._columns = columns.empty(self.n)
        self._pending: list[Entries] = []
        self._entries = 0
        self._epoch = torch.zeros(epoch.length(self.classes), dtype=torch.int64, device="cpu")
        self._wide = False  # more classes than the columns have room for
        self._warned = False

    @fixed
    def n(self) -> int:
        """The number of samples in the data set."""
        return self._n

    @fixed
    def classes(self) -> int | None:
        """The number of classes, if their keep rates are wanted."""
        return self._classes

    @by_name
    def record(
        self,
        last: ChoiceLike | Tensor | None,
        losses: Tensor | None = None,
        selection: Selection | None = None,
        *,
        ids: Iterable[int] | Tensor | None = None,
        outputs: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch: ``log.record(trim.last, ids=ids)``.

        Args:
            last: the choice to record: :attr:`batchtrim.Trimmer.last`, :attr:`batchtrim.TrimmedForward.last`, or
                a :class:`batchtrim.Choice` of your own.
            ids: integers (B,), a tensor, an array or a list: the samples' rows in the data set; one may
                occur twice.
            outputs: (B, C) logits, for the last prediction of each sample and its confidence. If ``last`` is a
                TrimmedForward's and there are ``labels``, the default is the model's outputs, if they have that form.
            labels: integers (B,); below 0 for none.
            losses, selection, mask: deprecated: ``log.record(ids, losses, selection, mask=mask)``.

        Raises:
            ValueError, TypeError: there was no choice (a compiled step leaves none), or shapes, dtypes, ids or labels
                do not fit. Ids on a device are checked in :meth:`end_epoch`.
        """
        if isinstance(last, Tensor):
            ids, last = batches.as_before(last, losses, selection, mask)
        elif losses is not None or selection is not None or mask is not None:
            named = "Name the ids: log.record(trim.last, ids=ids)."
            cure = named if ids is None else "Make one: Choice(losses, selection)."
            raise TypeError(f"expected `losses`, `selection` and `mask` inside of `last`, got them beside it. {cure}")
        losses, selection, mask = batches.parts_of(last)
        if labels is not None and outputs is None:
            outputs = batches.logits_of(getattr(last, "outputs", None), len(losses))
        ids = batches.check_batch(losses, mask, ids, outputs, labels)
        packed = batches.pack(
            losses, selection, mask, ids, outputs, labels, n=self.n, classes=self.classes, step=self.steps
        )
        self._wide |= outputs is not None and outputs.shape[1] > columns.INT16_CLASSES
        self._pending.append(packed)
        self._entries += len(packed.rows)
        self.steps += 1
        if len(self._pending) >= _FLUSH_BATCHES or (self._entries >= _FLUSH_ENTRIES and not self.distributed):
            self._flush()

    def end_epoch(self) -> dict[str, Any]:
        """End an epoch: enter buffered batches, add a line to ``history``, and warn if noise is being amplified.

        Returns:
            The line, a dict:

            * ``steps``: batches so far; ``seen``, ``kept``: samples in the epoch; ``keep``: their ratio.
            * ``doubt``, ``doubt_kept``: the fraction of all and of the kept samples whose label is contradicted by one
              of the most confident quarter of the predictions; None without outputs and labels.
            * ``stay_hard``, ``stay_easy``: the fractions of the hardest and easiest tenth, by each sample's previous
              loss, that are so again; None in the first epoch. ``compared``: the size of that hardest tenth.
            * ``hard_kept``: the fraction of the hardest tenth that is kept.
            * ``class_seen``, ``class_kept``: lists of C counts, if asked for.

        Raises:
            ValueError: an id on a device was out of range; it was not checked earlier, since that would stall the
                device.
        """
        self._flush()
        if self.history and self.history[-1]["steps"] == self.steps:
            return dict(self.history[-1])
        sums = self._epoch.tolist()
        line = epoch.line(sums, self.steps, self.classes)
        self.history.append(line)
        self._epoch.zero_()
        if beyond := epoch.outside(sums):
            labels = f", and `labels` below {self.classes}" if self.classes else ""
            raise ValueError(f"expected `ids` from 0 to {self.n - 1}{labels}, got {beyond} outside in the epoch.")
        if self.warn and not self._warned:
            self._warned = noise.warn_of(self.history, stacklevel=3)
        return dict(line)  # the caller may change it

    def table(self) -> dict[str, Tensor]:
        """Return all samples on the CPU: seen, kept, keep_rate, first, last, mean, variance, last_dropped and more.

        Losses of samples never seen are NaN; ``last_dropped`` is the number of the batch, -1 for never; ``predicted``
        is -1 and ``confidence`` NaN if no outputs were given. ``variance`` divides by the number of times seen.
        """
        self._check_nothing_apart()
        if self._pending:
            self._flush()
        return columns.read(self._columns)

    @_plain_mode
    def merge(self, later: KeepLog) -> None:
        """Add another log of the same data set, as if its batches had been recorded after those of this one."""
        if not isinstance(later, KeepLog):
            raise TypeError(f"expected `later` to be a batchtrim.KeepLog, got {describe(later)}.")
        for name in ("n", "classes"):
            mine, theirs = getattr(self, name), getattr(later, name)
            if mine != theirs:
                what = "samples" if name == "n" else "classes"
                raise ValueError(
                    f"expected a log of {mine} {what}, got one of {theirs}. Ids must mean the same samples."
                )
        for log in (self, later):
            log._check_nothing_apart()
            if log._pending:
                log._flush()
        device = self._columns["seen"].device
        theirs = {name: column.to(device) for name, column in later._columns.items()}
        self._columns = columns.merged(self._columns, theirs, self.steps)
        self._epoch += later._epoch.to(self._epoch.device)
        self.history += [{**line, "steps": line["steps"] + self.steps} for line in later.history]
        self.steps += later.steps

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: tensors, numbers and strings only. A run that loads it continues exactly."""
        self._check_nothing_apart()
        return states.save(self)

    @_plain_mode
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: the state is from a log with another n or other classes, from another version, or damaged.
        """
        states.load(self, state)

    def to_parquet(self, path: str | Path, **columns: Any) -> None:
        """Write :meth:`table` with an ``id`` column, more ``columns`` of n values, and the history as metadata.

        Raises:
            InstallExtra: pyarrow is missing.
        """
        parquet.write(self, path, columns)

    @classmethod
    @_plain_mode
    def from_parquet(cls, path: str | Path) -> KeepLog:
        """Read what :meth:`to_parquet` wrote, except for added columns.

        Raises:
            ValueError: the file is of another kind, or damaged. InstallExtra: pyarrow is missing.
        """
        return parquet.read(cls, path)

    @_plain_mode
    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy: one made in inference mode can be recorded into outside of it."""
        vars(self).update(state)
        self._columns = {name: _plain(column) for name, column in self._columns.items()}
        self._epoch = _plain(self._epoch)

    def __repr__(self) -> str:
        return f"KeepLog(n={self.n}, {self.steps} batches in {len(self.history)} epochs)"

    @property
    def _several(self) -> bool:
        """True if other ranks record too."""
        return self.distributed and world_size() > 1

    def _check_nothing_apart(self) -> None:
        if self.distributed and self._pending:
            raise RuntimeError(
                "expected end_epoch() before a distributed log is read, got batches held back. Call it on every rank."
            )

    @_plain_mode
    def _flush(self) -> None:
        """Enter all buffered batches; with several ranks, each does so at the same time."""
        if not self._pending and not self._several:
            return
        # batches of a loaded state are on the CPU, and so are the columns before the first batch
        device = (self._pending[-1].rows if self._pending else self._columns["seen"]).device
        if self._several:
            device = exchange.meeting_device(device)
        entries = batches.joined(self._pending, device)
        if self._several:
            entries, self._wide = exchange.gathered(entries, len(self._pending), self.n, self.classes, wide=self._wide)
        self._pending, self._entries = [], 0
        if not len(entries.rows):
            return
        if self._columns["seen"].device != device:
            self._columns = {name: column.to(device) for name, column in self._columns.items()}
            self._epoch = self._epoch.to(device)
        if self._wide:
            self._columns = columns.widened(self._columns)
        within = torch.where((entries.rows < 0) | (entries.rows > self.n), self.n, entries.rows)
        stays = columns.enter(self._columns, entries._replace(rows=within))
        self._epoch += epoch.count(entries, stays, n=self.n, classes=self.classes)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
