"""The report's page in a real browser, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser, browser
from tests.reports import PPO, UNIFORM, add, write
from tests.reports import run as run  # the fixture

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH (Debian: chromium)"),
    pytest.mark.slow,
]
AT = """(number => {
  const svg = document.querySelector(".front svg");
  const data = JSON.parse(document.getElementById("points-data").textContent);
  svg.scrollIntoView({block: "center"});
  const [x, , y] = data.points[number].place;
  const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  return [at.x, at.y];
})(%d)"""
SAID = "document.getElementById('point').innerText"


def chips(tab: Browser) -> int:
    """How many parts of the front can be seen."""
    return tab.run(
        """[...document.querySelectorAll('.front [id^="kl-"], .front [id^="accuracy-"]')]
        .filter(part => part.style.display !== "none").length"""
    )


def test_the_page_loads_and_hover_keys_and_filter_work(run: Path, tmp_path: Path) -> None:
    learning = {"searcher": "ppo", "evaluation": 8, "mean_return": -1.0, "entropy": 2.0}
    (run / "search" / "curve.jsonl").write_text(json.dumps(learning) + "\n")
    page = write(add(run, PPO, UNIFORM))
    with browser(tmp_path / "profile") as tab:
        for width, height, dark in ((390, 844, False), (1400, 900, True)):
            tab.open(page, width, height, dark=dark)
            # Nothing but the page itself, and it is no wider than the window.
            assert {url for url in tab.requested if not url.startswith("data:")} <= {
                page.resolve().as_uri()
            }
            assert tab.run("document.documentElement.scrollWidth") <= width
            colour = tab.run("getComputedStyle(document.body).backgroundColor")
            assert (colour == "rgb(255, 255, 255)") is not dark

            tab.mouse("mouseMoved", *tab.run(AT % 3))
            said = tab.run(SAID)
            assert "uniform, evaluation 1" in said
            assert "222,000" in said
            assert tab.run("document.querySelectorAll('#point rect').length") == 6
            tab.mouse("mouseMoved", *tab.run(AT % 0))
            assert "ppo, evaluation 1" in tab.run(SAID)

            whole = chips(tab)
            tab.run("document.querySelector('[data-searcher=\"1\"]').click()")
            # Points, line, front and ticket in two panels, and the ticket's name.
            assert chips(tab) == whole - 9
            tab.mouse("mouseMoved", *tab.run(AT % 3))
            assert "uniform" not in tab.run(SAID)
            tab.run("document.querySelector('[data-searcher=\"1\"]').click()")
            assert chips(tab) == whole

            tab.run("document.querySelector('.front svg').focus()")
            seen = set()
            # The last point that was hovered is the largest: back first.
            for key in ("ArrowLeft",) * 5 + ("ArrowRight",) * 5:
                for kind in ("keyDown", "keyUp"):
                    tab.send("Input.dispatchKeyEvent", type=kind, key=key)
                seen.add(tab.run(SAID))
            assert len(seen) > 1
            assert "uniform, evaluation 1" in tab.run(SAID)  # the largest
        assert tab.problems == []
        tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
