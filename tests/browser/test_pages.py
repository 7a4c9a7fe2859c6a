"""The built book in a real browser, at desk and phone width."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
PAGES = sorted(path.stem for path in HTML.glob("*.html") if path.stem not in ("index", "search"))
SIZES = {1280: 800, 390: 844}


def missing() -> str:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "no chromium and chromedriver on this machine"
    return "" if PAGES else "no built book: run `make book` first"


pytestmark = pytest.mark.skipif(
    bool(missing()) and not os.environ.get("COVIDMTL_REQUIRE_DATA"), reason=missing()
)


@pytest.fixture(scope="module", params=SIZES)
def browser(request: pytest.FixtureRequest) -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    size = {"width": request.param, "height": SIZES[request.param], "deviceScaleFactor": 1}
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {**size, "mobile": request.param < 600}
    )
    yield driver
    driver.quit()


def test_there_are_pages() -> None:
    assert {"intro", "cohort", "scoreboard"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_nothing_sticks_out_and_every_image_loads(browser: webdriver.Chrome, page: str) -> None:
    browser.get((HTML / f"{page}.html").as_uri())
    width = browser.execute_script("return window.innerWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    broken = (
        "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    )
    assert browser.execute_script(broken) == []
    squeezed = (
        "return [...document.querySelectorAll('.cell_output img')].filter(i => i.width && "
        "Math.abs(i.width / i.height - i.naturalWidth / i.naturalHeight) > 0.02).length"
    )
    assert browser.execute_script(squeezed) == 0
    tall = (
        "return [...document.querySelectorAll('.bd-article :is(td, th)')]"
        ".filter(e => e.getBoundingClientRect().height > 200).map(e => e.textContent)"
    )
    assert browser.execute_script(tall) == []
    unreachable = """
      return [...document.querySelectorAll('.bd-article table, .bd-article pre, .bd-article img')]
        .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
        .filter(e => { for (let p = e; p; p = p.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
          return true; }).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(unreachable) == []


def test_scoreboards_summary_is_on_the_first_screen(browser: webdriver.Chrome) -> None:
    browser.get((HTML / "scoreboard.html").as_uri())
    box = "return document.getElementById('summary').getBoundingClientRect()"
    summary = browser.execute_script(box)
    assert summary["top"] >= 0 and summary["bottom"] <= browser.execute_script(
        "return window.innerHeight"
    )


def test_scoreboard_can_be_filtered(browser: webdriver.Chrome) -> None:
    browser.get((HTML / "scoreboard.html").as_uri())
    browser.implicitly_wait(10)
    box = browser.find_element("css selector", ".dt-search input")
    browser.execute_script("arguments[0].scrollIntoView()", box)
    box.send_keys('"Table 8"')
    info = browser.find_element("css selector", ".dt-info").text
    assert "of 15 entries" in info, info


def test_pictures_can_be_scrubbed_without_a_kernel(browser: webdriver.Chrome) -> None:
    browser.get((HTML / "shift3d.html").as_uri())
    seen = """
      const box = document.querySelector('.scrubber'), slider = box.querySelector('input');
      if (arguments[0] !== null) {
        slider.value = arguments[0];
        slider.dispatchEvent(new Event('input', {bubbles: true}));
      }
      return [[...box.querySelectorAll('img')].map(i => i.offsetWidth > 0),
              box.querySelector('output').textContent]"""
    visible, label = browser.execute_script(seen, None)
    assert visible.index(True) == len(visible) // 2 and sum(visible) == 1
    assert label == "shifted by 0 voxels"
    visible, label = browser.execute_script(seen, 0)
    assert visible.index(True) == 0 and sum(visible) == 1
    assert label == "shifted by -8 voxels"
