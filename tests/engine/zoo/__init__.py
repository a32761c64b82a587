"""Small networks of every kind that an engine must get right, and some that break naive slicing."""

from zoo.apart import *  # noqa: F403
from zoo.batches import *  # noqa: F403
from zoo.odd import *  # noqa: F403
