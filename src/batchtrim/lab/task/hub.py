"""Check once, with a short timeout, that the Hugging Face hub answers, to report a missing connection early."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

WAIT = 5.0  # seconds to wait for an answer


def load_dataset(datasets: Any, name: str, config: str | None) -> Any:
    """Return the splits of a data set from the hub, or from the cache of `datasets` if the hub does not answer.

    Raises:
        OSError, ValueError, RuntimeError and more: the library's errors. ConnectionError: no hub and no copy.
    """
    if _answers():
        return datasets.load_dataset(name, config)
    with _offline(datasets):
        try:
            return datasets.load_dataset(name, config)
        except Exception as error:  # its message, "offline mode is enabled", would be misleading
            raise ConnectionError("no connection, and no copy of it on this machine") from error


def _answers() -> bool:
    """True if the hub's address answers at all."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True  # set by the user: the library handles it
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=WAIT).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    from huggingface_hub import constants

    places = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
    try:
        for place, _ in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, before in places:
            place.HF_HUB_OFFLINE = before
