"""The page in a real Chromium without a window: nothing loaded, nothing logged, charts drawn,
readable on a phone, dark where asked for, whole on paper.

MOESIM_BROWSER=required makes a missing browser a failure, as continuous integration does where it
has installed one.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim.draw import colours as colour_table

PHONE, DESKTOP = 360, 1280
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
OVERFLOWING = """
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && box.right > innerWidth + 0.5 && !e.closest('.scroll')
      && !e.closest('svg.chart');
}).map(e => e.outerHTML.slice(0, 120));
"""
CHARTS = """
return [...document.querySelectorAll('svg.chart')].map(svg => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('.mark')].map(m => m.getBBox());
  const texts = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
  const view = svg.viewBox.baseVal, slack = 2;
  return {
    title: svg.querySelector('title').textContent,
    width: box.width, height: box.height, marks: marks.length,
    empty: marks.filter(b => b.width + b.height === 0).length,
    outside: [...svg.querySelectorAll('text')].filter((t, i) => {
      const b = texts[i];
      return b.left < box.left - slack || b.right > box.right + slack
          || b.top < box.top - slack || b.bottom > box.bottom + slack;
    }).map(t => t.textContent),
    pixels: 11 * box.width / view.width,
  };
});
"""


def missing(what: str) -> None:
    if os.environ.get("MOESIM_BROWSER") == "required":
        pytest.fail(f"{what} is missing, and MOESIM_BROWSER=required")
    pytest.skip(
        f"{what} is missing: apt-get install chromium chromium-driver, pip install selenium"
    )


class Browser:
    """A Chromium that shows one page, and what the tests ask of it."""

    def __init__(self, driver: Any, page: Path) -> None:
        self.driver = driver
        self.address = page.as_uri()

    def show(self, width: int, scheme: str = "light") -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            media="screen",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.driver.get(self.address)

    def send(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(script)


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (chromium := shutil.which("chromium")):
        missing("chromium")
    if not (chromedriver := shutil.which("chromedriver")):
        missing("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        missing("selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(str(chromedriver))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver, page)
    finally:
        driver.quit()


def test_nothing_is_logged_and_nothing_requested(browser: Browser) -> None:
    browser.driver.get_log("performance")
    browser.show(DESKTOP)
    assert browser.driver.get_log("browser") == []
    events = [json.loads(e["message"])["message"] for e in browser.driver.get_log("performance")]
    asked = [
        e["params"]["request"]["url"]
        for e in events
        if e["method"] == "Network.requestWillBeSent"
        and e["params"]["documentURL"] == browser.address
    ]
    assert asked == [browser.address]
    assert browser.ask("return performance.getEntriesByType('resource').length") == 0


def test_the_style_sheet_passes_the_page_s_own_policy(browser: Browser) -> None:
    browser.show(DESKTOP)
    assert browser.ask("return document.styleSheets[0].cssRules.length") > 50
    script = "const s = document.createElement('script'); s.text = 'window.ran = 1';"
    blocked = browser.ask(script + "document.body.append(s); return window.ran === undefined")
    assert blocked
    assert "Content Security Policy" in browser.driver.get_log("browser")[0]["message"]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_chart_is_drawn_whole_and_legible(browser: Browser, width: int) -> None:
    browser.show(width)
    charts = browser.ask(CHARTS)
    assert len(charts) >= 24
    for chart in charts:
        assert chart["title"]
        assert chart["width"] > 250, chart
        assert chart["height"] > 60, chart
        assert chart["marks"] > 0, chart
        assert chart["empty"] == 0, chart
        assert chart["outside"] == [], chart
        assert 9 <= chart["pixels"] <= 16, chart


def test_charts_hold_as_many_marks_as_there_are_data(browser: Browser) -> None:
    browser.show(DESKTOP)
    marks = {chart["title"]: chart["marks"] for chart in browser.ask(CHARTS)}
    assert marks["Load by layer and GPU: linear"] == 8 * 4
    assert marks["Traffic from GPU to GPU: eplb"] == 4 * 3
    assert marks["Busiest GPU of a batch and layer"] == 3
    assert marks["Where the MoE time of a step goes"] == 3 * 3
    assert marks["How long a step takes"] == 3
    assert marks["Time to first token"] == 1
    # 4 points, and the answer once more.
    assert marks["Pareto front"] == 5
    assert marks["Predicted time by layer: greedy"] == 8 * 3
    # 8 cases of 3 layers each.
    assert marks["Time of a layer, predicted against measured"] == 24


@pytest.mark.parametrize("width", [320, PHONE, 768, DESKTOP])
def test_no_width_scrolls_sideways(browser: Browser, width: int) -> None:
    browser.show(width)
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    assert browser.ask(OVERFLOWING) == []
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    assert browser.ask(OVERFLOWING) == []


COLOURS = """
const of = (s, p) => getComputedStyle(document.querySelector(s))[p];
return [of('body', 'backgroundColor'), of('body', 'color'), of('.chart text', 'fill'),
        of('.chart [fill="#0072b2"]', 'fill'), of('.chart [fill="#f2f1ed"]', 'fill'),
        of('.card', 'backgroundColor'),
        of('.detail', 'color'), of('a', 'color')];
"""


def luminance(colour: str) -> float:
    """Relative luminance of an rgb() colour (WCAG 2.2)."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dark_mode_has_colours_of_its_own_and_both_have_contrast(browser: Browser) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        browser.show(DESKTOP, scheme)
        seen[scheme] = browser.ask(COLOURS)
        page, text, chart_text, first, _, card, soft, link = seen[scheme]
        assert contrast(page, text) > 7
        assert contrast(card, chart_text) > 4.5
        assert contrast(card, soft) > 4.5
        assert contrast(page, link) > 4.5
        assert contrast(card, first) > 3
    assert all(a != b for a, b in zip(*seen.values(), strict=True))
    assert luminance(seen["dark"][0]) < 0.02 < 0.9 < luminance(seen["light"][0])


SERIES = """
return arguments[0].map(colour => {
  const e = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
  e.setAttribute('fill', colour);
  document.querySelector('svg.chart').append(e);
  return getComputedStyle(e).fill;
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_series_colours_stay_apart_for_the_colour_blind(browser: Browser, scheme: str) -> None:
    # Simulation matrices of Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB.
    browser.show(DESKTOP, scheme)
    colours = browser.driver.execute_script(SERIES, list(colour_table.SERIES))
    views: dict[str, Callable[[list[float]], list[float]]] = {
        "deuteranopia": lambda c: _times(DEUTERANOPIA, c),
        "protanopia": lambda c: _times(PROTANOPIA, c),
    }
    # Blue, orange, grey are what plans are compared in; these three must differ for everybody.
    for view in views.values():
        plans = [_lab(view(_linear(colours[i]))) for i in (0, 1, 7)]
        for i in range(3):
            for j in range(i):
                apart = sum((a - b) ** 2 for a, b in zip(plans[i], plans[j], strict=True)) ** 0.5
                assert apart > 20


DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)
PROTANOPIA = (
    (0.152286, 1.052583, -0.204868),
    (0.114503, 0.786281, 0.099216),
    (-0.003882, -0.048116, 1.051998),
)


def _linear(colour: str) -> list[float]:
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def _times(matrix: Any, vector: list[float]) -> list[float]:
    return [
        min(1.0, max(0.0, sum(a * b for a, b in zip(row, vector, strict=True)))) for row in matrix
    ]


def _lab(rgb: list[float]) -> list[float]:
    """CIELAB of linear sRGB, white point D65."""
    r, g, b = rgb
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def test_it_prints_on_white_with_every_chart(browser: Browser, tmp_path: Path) -> None:
    browser.show(DESKTOP, "dark")
    browser.send(
        "Emulation.setEmulatedMedia",
        media="",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    printed = browser.send("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
    raw = base64.b64decode(printed["data"])
    assert raw.startswith(b"%PDF-")
    pages = len(re.findall(rb"/Type\s*/Page[^s]", raw))
    assert 4 <= pages <= 40
    browser.send("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.ask("return getComputedStyle(document.querySelector('nav')).display") == "none"
    cut = "return getComputedStyle(document.querySelector('figure')).breakInside"
    assert browser.ask(cut) == "avoid"
    charts = browser.ask(CHARTS)
    assert all(c["width"] > 100 and c["height"] > 40 for c in charts)


def test_tables_open_without_a_script_and_say_the_same(browser: Browser) -> None:
    browser.show(PHONE)
    from selenium.webdriver.common.by import By

    summary = browser.driver.find_element(By.CSS_SELECTOR, "figure summary")
    table = browser.driver.find_element(By.CSS_SELECTOR, "figure details table")
    assert not table.is_displayed()
    scroll = "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})"
    browser.driver.execute_script(scroll, summary)
    summary.click()
    assert table.is_displayed()
    shown = browser.ask(
        "return [...document.querySelector('figure svg').querySelectorAll('text')]"
        ".filter(t => t.getAttribute('font-weight') == 600).map(t => t.textContent)"
    )
    assert shown
    assert all(text.split()[0] in table.text for text in shown)
