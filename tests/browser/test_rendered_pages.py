"""The built book in a real browser, at desk and phone width, from the disk: nothing is served."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import resources
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
    yield from browser_of(request.param)


@pytest.fixture(scope="module")
def desk() -> Iterator[webdriver.Chrome]:
    """For what does not depend on the width."""
    yield from browser_of(1280)


def browser_of(width: int) -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    size = {"width": width, "height": SIZES[width], "deviceScaleFactor": 1}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "mobile": width < 600})
    yield driver
    driver.quit()


def eventually(browser: webdriver.Chrome, script: str, wanted: Callable[[object], bool]) -> object:
    """What a script returns, once it is as wanted, or after ten seconds."""
    for _ in range(100):
        found = browser.execute_script(script)
        if wanted(found):
            break
        time.sleep(0.1)
    return found


def test_there_are_pages() -> None:
    assert {"intro", "cohort", "scoreboard"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_whole_and_from_the_disk_alone(desk: webdriver.Chrome, page: str) -> None:
    for log in ("browser", "performance"):
        desk.get_log(log)
    desk.get((HTML / f"{page}.html").as_uri())
    typeset = (
        "return [...document.querySelectorAll('.math')]"
        ".every(e => e.querySelector('mjx-container'))"
    )
    assert eventually(desk, typeset, bool), "formulas are not set"
    events = [json.loads(entry["message"])["message"] for entry in desk.get_log("performance")]
    asked = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    elsewhere = [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))]
    assert elsewhere == [], "needs the network"
    failed = [e["params"] for e in events if e["method"] == "Network.loadingFailed"]
    assert failed == []
    errors = [entry["message"] for entry in desk.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read_by_everybody(desk: webdriver.Chrome, page: str) -> None:
    """Contrast and names of pictures, links and controls, by axe-core."""
    desk.get((HTML / f"{page}.html").as_uri())
    axe = resources.files("axe_core_python") / "axe.min.js"
    desk.execute_script(axe.read_text(encoding="utf-8"))
    rules = ["color-contrast", "image-alt", "link-name", "label", "frame-title", "select-name"]
    found = desk.execute_async_script(
        "const [rules, done] = arguments;"
        "axe.run('.bd-article', {iframes: false, runOnly: {type: 'rule', values: rules}})"
        ".then(r => done(r.violations.flatMap(v => v.nodes.map(n => v.id + ': ' + n.html))))",
        rules,
    )
    assert found == []


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


def test_search_finds_a_word(desk: webdriver.Chrome) -> None:
    desk.get((HTML / "search.html").as_uri() + "?q=Dirichlet")
    links = "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    found = eventually(desk, links, lambda hrefs: len(hrefs) > 1)  # type: ignore[arg-type]
    assert any("random_weighted_loss.html" in href for href in found), found  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["segmentation", "your_own_scan", "case_study"])
def test_lungs_can_be_turned(desk: webdriver.Chrome, page: str) -> None:
    desk.get((HTML / f"{page}.html").as_uri())
    frame = desk.find_element("css selector", "iframe[srcdoc]")
    desk.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
    desk.switch_to.frame(frame)
    eye = (
        "const g = document.querySelector('.js-plotly-plot');"
        "return g && g._fullLayout && g._fullLayout.scene ? "
        "JSON.stringify(g._fullLayout.scene.camera.eye) : null"
    )
    before = eventually(desk, eye, bool)
    assert before, "no surface was drawn"
    surface = desk.find_element("css selector", ".js-plotly-plot")
    pull = webdriver.ActionChains(desk)
    pull.move_to_element_with_offset(surface, -surface.size["width"] // 4, 0)  # the left of two
    pull.click_and_hold().move_by_offset(60, 20).release().perform()
    after = eventually(desk, eye, lambda found: found != before)
    desk.switch_to.default_content()
    assert after != before, "dragging did not turn it"
