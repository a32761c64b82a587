"""A log of what was kept, per sample: times seen and kept, first and last loss, mean and variance, last drop.

:mod:`~batchtrim.keeplog.log` is the log itself. Its parts: ``batch``, what is recorded of a batch;
``columns``, the numbers of each sample; ``epoch``, the sums of an epoch; ``exchange``, several ranks; ``state``, a
checkpoint; ``parquet``, a file; ``ranking``, likely label errors. ``batchtrim/noise.py`` decides when it warns.
"""

from batchtrim.keeplog.log import KeepLog
from batchtrim.keeplog.ranking import suspects
from batchtrim.noise import NoiseAmplified

__all__ = ["KeepLog", "NoiseAmplified", "suspects"]
