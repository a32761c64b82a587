"""A log of what was kept, sample by sample: times seen and kept, first and last loss, mean and variance, last dropped.

:mod:`~batchtrim.keeplog.log` is the log itself. What it is made of: ``batch``, what is recorded of a batch;
``columns``, the numbers of each sample; ``epoch``, the sums of an epoch; ``exchange``, several ranks; ``state``, a
checkpoint; ``parquet``, a file; ``ranking``, likely label errors. When it warns is decided in ``batchtrim/noise.py``.
"""

from batchtrim.keeplog.log import KeepLog
from batchtrim.keeplog.ranking import suspects
from batchtrim.noise import NoiseAmplified

__all__ = ["KeepLog", "NoiseAmplified", "suspects"]
