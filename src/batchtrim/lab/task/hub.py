"""Check once, with a short wait, that the Hugging Face hub answers, so that a machine without it is told early."""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

WAIT = 5.0  # seconds for an answer


def load_dataset(datasets: Any, name: str, config: str | None) -> Any:
    """Return the splits of a data set of the hub, or of the `datasets` library's own cache where no hub answers.

    Raises:
        OSError, ValueError, RuntimeError and more: what the library raises. ConnectionError: no hub and no copy.
    """
    if _answers():
        return datasets.load_dataset(name, config)
    with _offline(datasets):
        try:
            return datasets.load_dataset(name, config)
        except Exception as error:  # it would say "offline mode is enabled", which nobody did
            raise ConnectionError("no connection, and no copy of it on this machine") from error


def _answers() -> bool:
    """True if the hub's address answers anything at all."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True  # the user's own wish: the library knows it
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
