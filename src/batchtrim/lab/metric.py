"""The metric that runs are compared by: its name, which direction is better, and how it is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchtrim._checks import nearest

__all__ = ["ERROR", "FRACTIONS", "Metric"]

LOWER = ("error", "loss", "rmse", "mse", "mae", "mape", "nll", "perplexity", "wer", "cer", "brier", "ece", "fid", "eer")
HIGHER = (
    "accuracy", "acc", "f1", "macro_f1", "micro_f1", "auc", "auroc", "roc_auc", "average_precision", "precision",
    "recall", "r2", "iou", "miou", "dice", "map", "bleu", "rouge", "mcc", "balanced_accuracy", "ndcg", "mrr",
)  # fmt: skip
FRACTIONS = (*(name for name in HIGHER if name not in ("bleu", "rouge")), "wer", "cer", "ece", "eer", "brier")
MOST = 9  # decimals that are printed
LARGE = 1e15  # from here on, numbers are printed with an exponent
IN_PERCENT = ("error", "accuracy")  # fractions of the test samples, printed as percent and compared in points


@dataclass(frozen=True)
class Metric:
    """The number that each run ends with.

    Args:
        name: as in the task's result, or in the column of a table.
        higher_is_better: True if higher is better.

    Example:
        >>> Metric.called("rmse").better, Metric.called("f1").better, Metric.called("accuracy").number(0.9787)
        ('lower', 'higher', '97.87')
    """

    name: str = "error"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if not str(self.name).isprintable():
            raise ValueError(f"expected `metric` to be a name of printable characters, got {self.name!r}.")

    @classmethod
    def called(cls, name: str, higher_is_better: bool | None = None) -> Metric:
        """Return the metric of that name; pass the better direction if the name does not imply it.

        Raises:
            ValueError: the name implies no direction and none is given, or the direction contradicts the name.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"expected `metric` to be a name such as error, accuracy or rmse, got {name!r}.")
        if not isinstance(higher_is_better, bool | None):
            raise TypeError(f"expected `higher_is_better` to be true or false, got {higher_is_better!r}.")
        known = True if name.lower() in HIGHER else False if name.lower() in LOWER else None
        if known is None and higher_is_better is None:
            raise ValueError(
                f"expected `higher_is_better` for the metric {name!r}, whose name does not imply it, got nothing."
                f"{nearest(name, (*LOWER, *HIGHER))} Pass --higher-is-better or --lower-is-better; "
                "in Python, higher_is_better=True or False."
            )
        if known is not None and higher_is_better is not None and higher_is_better is not known:
            way = "higher" if known else "lower"
            raise ValueError(
                f"expected {way} to be better for the metric {name!r}, got the other way round. "
                "If that is intended, give the metric another name."
            )
        return cls(name, bool(known if known is not None else higher_is_better))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Metric:
        """Return the metric that recorded settings name; the lab's own runs are compared by their test error."""
        return cls(settings.get("metric") or "error", bool(settings.get("higher_is_better")))

    @property
    def field(self) -> str:
        """The name of the record's field, and of the curve, that holds the number."""
        return "test_error" if self.name == "error" else "value"

    @property
    def in_percent(self) -> bool:
        """True if the number is a fraction in [0, 1] that is printed as percent."""
        return self.name in IN_PERCENT

    @property
    def title(self) -> str:
        """The metric's name in a sentence: test error, rmse."""
        return f"test {self.name}" if self.in_percent else self.name

    @property
    def better(self) -> str:
        """The better direction: lower or higher."""
        return "higher" if self.higher_is_better else "lower"

    @property
    def heading(self) -> str:
        """The heading of a column: test error %, rmse."""
        return f"{self.title} %" if self.in_percent else self.name

    @property
    def unit(self) -> str:
        """The unit of a difference, with a space before it: points of a percentage, or nothing."""
        return " points" if self.in_percent else ""

    def number(self, value: float, digits: int = 2, spread: float | None = None) -> str:
        """Return the number alone: an error of 0.0213 is 2.13; other metrics have four significant digits.

        Args:
            spread: the spread of another metric; two of its significant digits are shown.
        """
        if self.in_percent:
            return f"{100 * value:.{digits}f}"
        if spread and math.isfinite(spread) and abs(value) < LARGE:
            decimals = max(0, 1 - math.floor(math.log10(abs(spread))))
            if decimals < MOST:
                return f"{value:.{decimals}f}"
        return f"{value:.4g}"

    def text(self, value: float | None) -> str:
        """Return the number with its name: error 2.13 %, rmse 0.4512."""
        if value is None:
            return f"{self.name} unknown"
        return f"{self.name} {self.number(value)}{' %' if self.in_percent else ''}"


ERROR = Metric()
