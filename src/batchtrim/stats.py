"""Statistics of what was kept. They stay on the device until asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchtrim._checks import check_count, check_state, describe, without_values
from batchtrim.selection import Selection

__all__ = ["KeepStats"]

# Batches held before they are summed: an occasional stacked sum costs less than small sums in every batch.
_FLUSH_EVERY = 256
_FLUSH_LARGE = 1 << 14
_SUM_DTYPE = torch.float64


class KeepStats:
    """Running sums over the batches since the last :meth:`reset`.

    Recording costs a copy of the losses and no device sync; :meth:`compute` syncs.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded so far."""
        self._counts = {"batches": 0, "seen": 0, "kept": 0}
        # sums of: all losses, kept losses, smallest kept loss of a batch
        self._sums: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor, int]] = []

    def record(self, losses: Tensor, selection: Selection, mask: Tensor | None = None) -> None:
        """Add a batch: detached ``losses`` (B,) and the selection from them. Nothing on the meta device."""
        if selection.candidates == 0 or without_values(losses):
            return
        # a copy, since the caller may change the losses in place afterwards
        if mask is None or selection.candidates == selection.size:
            losses = losses.clone()
        else:
            losses = torch.where(mask, losses, 0.0)
        pending = self._pending
        pending.append((losses, selection.indices, selection.candidates))
        if len(pending) >= _FLUSH_EVERY or selection.size > _FLUSH_LARGE:
            self._flush()

    def compute(self) -> dict[str, float]:
        """Return the numbers since the last reset, as Python floats and ints.

        Returns:
            batches, seen, kept: counts; ``keep``: kept / seen.
            mean_loss, kept_loss: mean loss over the samples seen and over those kept.
            ratio: kept_loss / mean_loss: how much larger a trimmed step's loss is than a plain one's.
            threshold: smallest kept loss, averaged over the batches.
            All but the counts are NaN before the first batch.
        """
        self._flush()
        counts = self._counts
        sums = [float("nan")] * 3 if self._sums is None else self._sums.tolist()
        seen, kept, batches = (counts[name] or 1 for name in ("seen", "kept", "batches"))
        mean_loss, kept_loss = sums[0] / seen, sums[1] / kept
        return {
            **counts,
            "keep": counts["kept"] / seen if counts["batches"] else float("nan"),
            "mean_loss": mean_loss,
            "kept_loss": kept_loss,
            "ratio": kept_loss / mean_loss if mean_loss else float("nan"),
            "threshold": sums[2] / batches,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return counts and sums, safe for ``torch.load(weights_only=True)``. Shapes are always the same."""
        self._flush()
        sums = torch.zeros(3, dtype=_SUM_DTYPE, device="cpu") if self._sums is None else self._sums.to("cpu", copy=True)
        return {**self._counts, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            ValueError, TypeError: the state is of another kind.
        """
        check_state(state, (*self._counts, "sums"), "KeepStats")
        counts = {name: check_count(f"state['{name}']", state[name], minimum=0) for name in self._counts}
        sums = state["sums"]
        if sums is not None and not (isinstance(sums, Tensor) and sums.shape == (3,)):
            raise ValueError(f"expected `state['sums']` to be a tensor of shape (3,), got {describe(sums)}.")
        self.reset()
        self._counts = counts
        self._sums = None if sums is None or not counts["batches"] else sums.clone()

    def _flush(self) -> None:
        if not self._pending:
            return
        losses, indices, candidates = (list(parts) for parts in zip(*self._pending, strict=True))
        sizes, ks = [each.numel() for each in losses], [each.numel() for each in indices]
        counts = self._counts
        counts["batches"] += len(sizes)
        counts["seen"] += sum(candidates)
        counts["kept"] += sum(ks)
        if len(set(sizes)) == len(set(ks)) == 1:
            seen = torch.stack(losses)
            kept = seen.gather(1, torch.stack(indices))
            lows = kept.amin(1)
        else:
            seen, device = torch.cat(losses), losses[0].device
            batch_of = torch.arange(len(ks), device="cpu").repeat_interleave(torch.tensor(ks, device="cpu")).to(device)
            starts = torch.tensor([0, *sizes[:-1]], device="cpu").cumsum(0).to(device)
            kept = seen[torch.cat(indices) + starts[batch_of]]
            lows = kept.new_full((len(ks),), float("inf")).scatter_reduce_(0, batch_of, kept, "amin")
        sums = torch.stack([part.sum(dtype=_SUM_DTYPE) for part in (seen, kept, lows)])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
        self._pending = []

    def __repr__(self) -> str:
        self._flush()
        return f"KeepStats(batches={self._counts['batches']}, kept={self._counts['kept']} of {self._counts['seen']})"
