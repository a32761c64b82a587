"""What was kept, in numbers. They stay on the device until asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchtrim.selection import Selection

__all__ = ["KeepStats"]

# Batches held before they are summed up: one stacked sum a while costs less than small sums every batch.
_FLUSH_EVERY = 64
_FLUSH_NUMBERS = 1 << 20


class KeepStats:
    """Running sums over the batches since the last :meth:`reset`.

    Recording costs one sum over the batch and no device sync; :meth:`compute` syncs.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded so far."""
        self._counts = {"batches": 0, "seen": 0, "kept": 0}
        # sums of: all losses, kept losses, smallest kept loss of a batch
        self._sums: Tensor | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pending_numbers = 0

    def record(self, losses: Tensor, selection: Selection, mask: Tensor | None = None) -> None:
        """Add a batch: detached ``losses`` (B,) and what was chosen of them."""
        if selection.k == 0:
            return
        counts = self._counts
        counts["batches"] += 1
        counts["seen"] += selection.candidates
        counts["kept"] += selection.k
        whole = losses if mask is None else torch.where(mask, losses, 0.0)
        kept = losses.clone() if selection.k == selection.size else losses.index_select(0, selection.indices)
        self._pending.append((whole.sum(dtype=_sum_dtype(losses)), kept))
        self._pending_numbers += selection.k
        if len(self._pending) >= _FLUSH_EVERY or self._pending_numbers > _FLUSH_NUMBERS:
            self._flush()

    def compute(self) -> dict[str, float]:
        """The numbers since the last reset, as Python floats and ints.

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
        """Counts and sums; safe for ``torch.load(weights_only=True)``."""
        self._flush()
        return {**self._counts, "sums": None if self._sums is None else self._sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.reset()
        self._counts = {name: int(state[name]) for name in self._counts}
        self._sums = None if state["sums"] is None else state["sums"].clone()

    def _flush(self) -> None:
        if not self._pending:
            return
        wholes = torch.stack([whole for whole, _ in self._pending])
        dtype = wholes.dtype
        kept = torch.cat([kept for _, kept in self._pending])
        lows = torch.stack([kept.min() for _, kept in self._pending])
        sums = torch.stack([wholes.sum(), kept.sum(dtype=dtype), lows.sum(dtype=dtype)]).to(torch.float64)
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
        self._pending, self._pending_numbers = [], 0

    def __repr__(self) -> str:
        return f"KeepStats(batches={self._counts['batches']}, kept={self._counts['kept']} of {self._counts['seen']})"


def _sum_dtype(losses: Tensor) -> torch.dtype:
    """Half-precision losses are summed in fp32, as a mean of them is."""
    return torch.float32 if losses.dtype in (torch.float16, torch.bfloat16) else losses.dtype
