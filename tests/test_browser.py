"""A browser test is skipped if there is no browser, and fails if CI requires one."""

from __future__ import annotations

import pytest

import browser


def test_a_missing_browser_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("BATCHTRIM_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no chromium"):
        browser.find_browser()


def test_a_missing_browser_fails_where_one_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("BATCHTRIM_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="BATCHTRIM_REQUIRE_BROWSER is set"):
        browser.find_browser()
