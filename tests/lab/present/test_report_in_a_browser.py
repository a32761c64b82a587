"""The report as a browser shows it: it opens, no table is cut off, no identifier breaks, and only tables scroll."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from batchtrim.lab.present import report
from browser import find_browser


@pytest.mark.slow
def test_page_opens_in_a_browser(rows, tmp_path):
    """The script runs without an error: the browser would print it to its log."""
    page = report.write_report(rows, tmp_path)
    done = subprocess.run(
        [
            find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<svg" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_no_table_is_cut_off(make_row, tmp_path, width):
    names = {"full": 0.08, "trim": 0.07, "random": 0.1, "selective_backprop_topk": 0.09, "full_equal_compute": 0.08}
    for name, settings in {"several": [{"dataset": "cifar10"}, {"dataset": "digits"}], "one": [{}]}.items():
        rows = [
            make_row(method, seed, None if (method, seed) == ("random", 3) else error + 0.001 * seed, **each)
            for each in settings
            for method, error in names.items()
            for seed in range(5)
        ]
        if name == "one":
            rows += [make_row("trim", seed, 0.07 + 0.001 * seed, keep_end=0.1, schedule=schedule)
                     for schedule in ("linear", "step") for seed in range(5)]  # fmt: skip
            rows += [make_row("trim", seed, 0.07 + 0.001 * seed, keep_end=0.2, schedule="step") for seed in range(5)]
        page = report.write_report(rows, tmp_path / name)
        cut = "[...document.querySelectorAll('.scroll')].filter(each=>each.scrollWidth>each.clientWidth)"
        assert _seen(page, width, f"{cut}.map(each=>each.innerText.slice(0,40))") == ""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_no_identifier_breaks(make_row, tmp_path, width):
    """Its mark stood on a line of its own, and in the settings a name broke after any letter."""
    names = ("full", "selective_backprop_topk", "full_equal_compute")
    rows = [make_row(method, seed) for method in names for seed in range(5)]
    page = report.write_report(rows, tmp_path)
    lines = "new Set([...range.getClientRects()].map(each=>Math.round(each.top))).size"
    broken = (
        "[...document.querySelectorAll('.arm>:last-child, dt')].filter(each=>{const range=document.createRange();"
        f"range.selectNodeContents(each);return !each.innerText.includes(' ')&&{lines}>1}})"
    )
    assert _seen(page, width, f"{broken}.map(each=>each.innerText)") == ""


def _seen(page: Path, width: int, script: str) -> str:
    """Return the value of a script in the page as it is drawn in that width: a window is 500 pixels wide at least."""
    asks = f"<script>parent.postMessage(String({script}),'*')</script></body>"
    page.write_text(page.read_text().replace("</body>", asks))
    frame = page.with_name("frame.html")
    frame.write_text(
        "<script>onmessage=event=>document.title='seen: '+event.data+'.'</script>"
        f"<iframe src='{page.name}' style='width:{width}px;height:900px;border:0'></iframe>"
    )
    done = subprocess.run(
        [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.with_name('profile')}",
         "--window-size=1500,1000", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (seen,) = re.findall(r"<title>seen: (.*)\.</title>", done.stdout, re.DOTALL)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_only_tables_scroll_sideways(make_row, tmp_path, width):
    """However long the names of data sets, networks and parameters are; a table's first column stays in sight."""
    long = "a_name_of_a_data_set_of_ones_own_without_a_space_anywhere_in_it"
    rows = [
        make_row(method, seed, 0.1, dataset=f"/home/somebody/{long}", model=long, schedule=schedule, keep_end=end)
        for method, seed in itertools.product(("full", "trim"), range(2))
        for schedule, end in itertools.product(("linear", "cosine"), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    ]
    page = report.write_report(rows, tmp_path)
    beyond = "document.documentElement.scrollWidth-document.documentElement.clientWidth"
    first = "getComputedStyle(document.querySelector('.ends tbody th')).position"
    assert _seen(page, width, f"[{beyond},{first}]") == "0,sticky"
