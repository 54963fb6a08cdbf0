"""The page of all results as a browser shows it: on a phone and on a desktop, in light and in dark.

Needs playwright and a Chromium: one that is installed, else playwright's own, which is downloaded into its cache. Screenshots
of the page's top are left in the test's temporary folder (`--basetemp` says where); docs/report.png is one of them.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import sources, write

pytestmark = pytest.mark.browser

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "NVIDIA_H200"
INSTALLED = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 1280}

# Relative luminance and contrast as WCAG defines them; colours come as "rgb(r, g, b)".
CONTRAST = """
(selector) => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = luminance(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(selector)].map((element) => {
    const style = getComputedStyle(element);
    const own = luminance(element instanceof SVGElement ? (style.fill === "none" ? style.stroke : style.fill) : style.color);
    return (Math.max(own, back) + 0.05) / (Math.min(own, back) + 0.05);
  });
}
"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "report.html"
    write(sources.load(RESULTS), path)
    return path


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as started:
        found = next(filter(None, map(shutil.which, INSTALLED)), None)
        try:
            browser = started.chromium.launch(executable_path=found)
        except playwright.Error as error:
            if found or "Executable doesn't exist" not in error.message:
                raise
            install = [sys.executable, "-m", "playwright", "install", "--only-shell", "chromium"]
            done = subprocess.run(install, capture_output=True, text=True, timeout=240)
            if done.returncode:
                why = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("Error")]
                pytest.skip(f"no Chromium is installed and none can be downloaded: {(why or ['unknown'])[0]}")
            browser = started.chromium.launch()
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture(params=[PHONE, DESKTOP], ids=["phone", "desktop"])
def opened(request, scheme, chromium, page_file):
    """(the open page, what it asked for and what it complained of)"""
    heard = []
    page = chromium.new_page(viewport=request.param, color_scheme=scheme)
    page.on("request", lambda asked: heard.append(asked.url))
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.goto(page_file.as_uri())
    yield page, heard
    page.close()


def test_it_reads_well(opened, scheme, page_file):
    page, heard = opened
    assert heard == [page_file.as_uri()]  # nothing from outside, no complaint
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width  # only tables scroll sideways

    boxes = page.locator("figure svg").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    columns = 1 if width < 700 else 2
    assert len(boxes) >= 8 and min(boxes) > (0.8 * width if columns == 1 else 0.35 * width)
    letters = page.locator("figure svg text").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert min(letters) > 9  # with ascent and descent; 8 px letters

    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
    assert min(page.evaluate(CONTRAST, "p, th, td, a, summary, figcaption, svg text")) >= 4.5
    assert min(page.evaluate(CONTRAST, "svg path[style*='fill: none'][style*='--series']")) >= 3

    shot = page_file.with_name(f"{scheme}-{width}.png")
    page.screenshot(path=shot)
    assert shot.stat().st_size > 20_000


def test_long_tables_open_and_scroll_in_place(opened):
    page, _ = opened
    fold = page.locator("details.fold").first
    assert not fold.locator("table").is_visible()
    fold.locator("summary").first.click()
    assert fold.locator("table").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    # The first column stays where the rest scrolls away.
    region = fold.locator(".scroll")
    if region.evaluate("one => one.scrollWidth > one.clientWidth"):
        before = region.locator("tbody th").first.bounding_box()["x"]
        region.evaluate("one => { one.scrollLeft = 200 }")
        assert region.locator("tbody th").first.bounding_box()["x"] == before
    source = page.locator("details.source").first
    source.locator("summary").click()
    assert "python -m benchmarks" in source.inner_text()


def test_every_link_of_the_page_lands(opened):
    page, _ = opened
    for link in page.locator("nav a").all():
        link.click()
        target = page.locator(f"[id='{link.get_attribute('href')[1:]}']")
        assert target.bounding_box()["y"] < page.viewport_size["height"]
