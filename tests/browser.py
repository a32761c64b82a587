"""Find Chromium for tests of rendered pages; without it they are skipped, or fail if it is required."""

from __future__ import annotations

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """Return the path of a Chromium; skip the test without one, or fail it where BATCHTRIM_REQUIRE_BROWSER is set."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None and os.environ.get("BATCHTRIM_REQUIRE_BROWSER"):
        pytest.fail(f"BATCHTRIM_REQUIRE_BROWSER is set, and none of {', '.join(NAMES)} was found.")
    if found is None:
        pytest.skip("no chromium on this machine")
    return found
