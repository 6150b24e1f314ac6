"""The report in a real browser: Chromium without a window, the page opened from a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the extra `report` is not installed")

from aufast.label import LabelConfig, label_files, report
from aufast.label.finding import FoundFace, Seen
from aufast.label.report import FRAMES, ReportPage
from tests.label.clips import blank, encode, moving

AUS = (1, 12)


def content(page: Path) -> dict:
    text = page.read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Path:
    """Of a video with two faces and two frames without any."""
    folder = tmp_path_factory.mktemp("report")
    frames = [np.hstack([f, f]) for f in moving(10)]
    frames[4:6] = [np.hstack([blank(), blank()])] * 2
    video = encode(folder / "two <b>faces & more.mp4", frames)
    label_files([str(video)], folder / "out", LabelConfig(models["aar"], workers=1, report=True))
    return next((folder / "out").glob("*.html"))


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator:
    selenium = pytest.importorskip("selenium", reason="the report is tested with selenium")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("there is no chromium with chromedriver here: apt install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert selenium
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1100,1000"):
        options.add_argument(f"--{argument}")
    # Nothing may be fetched: every name leads nowhere.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.get(page.as_uri())
    yield browser
    browser.quit()


def run(browser, script: str, *arguments):
    return browser.execute_script(script, *arguments)


def caption(browser) -> str:
    return run(browser, "return document.getElementById('caption').textContent")


def visible(browser) -> list:
    return run(browser, "return chart.data.map((t) => [t.au, t.face, t.visible !== false])")


@pytest.mark.slow
def test_it_opens_offline_without_an_error(browser) -> None:
    assert run(browser, "return document.body.dataset.ready") == "true"
    assert browser.get_log("browser") == []
    assert browser.title == "two <b>faces & more.mp4"
    fetched = run(browser, "return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert len(visible(browser)) == 2 * 3 and all(entry[2] for entry in visible(browser))
    assert run(browser, "return document.querySelectorAll('.scatterlayer .trace').length") == 6


@pytest.mark.slow
def test_hovering_shows_the_frame(browser) -> None:
    from selenium.webdriver import ActionChains

    chart = browser.find_element("id", "chart")
    for part, expected in ((0.75, (8,)), (0.5, (5, 6)), (0.2, (2, 3))):
        width = chart.size["width"]
        ActionChains(browser).move_to_element_with_offset(chart, round((part - 0.5) * width), 0).pause(
            0.6
        ).perform()
        assert int(caption(browser).split()[1].rstrip(",:")) in expected
    assert (
        run(browser, "return document.querySelectorAll('.hoverlayer .legend, .hoverlayer .hovertext').length")
        > 0
    )


@pytest.mark.slow
def test_toggles_hide_an_au_and_a_face(browser) -> None:
    browser.find_element("id", "au4").click()
    assert {au for au, _, on in visible(browser) if on} == {1, 12}
    browser.find_element("id", "face1").click()
    assert {(au, face) for au, face, on in visible(browser) if on} == {(1, 0), (12, 0)}
    rows = run(
        browser, "return [...document.querySelectorAll('#values th[scope=row]')].map((n) => n.textContent)"
    )
    assert [row.split()[0] for row in rows] == ["AU1", "AU12"]
    for name in ("au4", "face1"):
        browser.find_element("id", name).click()
    assert all(on for _, _, on in visible(browser))


@pytest.mark.slow
def test_the_keyboard_goes_from_frame_to_frame(browser) -> None:
    from selenium.webdriver.common.keys import Keys

    body = browser.find_element("tag name", "body")
    body.send_keys(Keys.HOME)
    assert caption(browser).startswith("frame 1,")
    body.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert caption(browser).startswith("frame 3,")
    first = run(browser, "return document.getElementById('picture').src")
    body.send_keys(Keys.END)
    assert caption(browser).startswith("frame 10,")
    assert run(browser, "return document.getElementById('picture').src") != first
    assert run(browser, "return document.getElementById('picture').naturalHeight") >= 240
    body.send_keys(*[Keys.ARROW_LEFT] * 5)
    assert caption(browser) == "frame 5, 0.13 s: no face"
    assert run(browser, "return chart.layout.shapes.length") == 2, "the threshold and the chosen time"
    reached = []
    for _ in range(12):  # Tab reaches toggles and the chosen frame, and nothing traps it
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(run(browser, "return document.activeElement.id || document.activeElement.ariaLabel"))
    assert {"au1", "au4", "au12", "face0", "face1"} <= set(reached)


@pytest.mark.slow
def test_a_narrow_window_needs_no_sideways_scrolling(browser) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(500, 900)
    browser.set_script_timeout(10)
    browser.execute_async_script("setTimeout(arguments[0], 500)")
    width, inside = run(browser, "return [document.documentElement.scrollWidth, window.innerWidth]")
    chart = run(browser, "return chart.getBoundingClientRect().width")
    assert width <= inside and chart <= inside
    browser.find_element("tag name", "body").send_keys(Keys.END, Keys.ARROW_LEFT)
    seen = """
        const strip = document.getElementById("strip");
        const [a, b] = [strip, strip.querySelector("[aria-current]")].map((n) => n.getBoundingClientRect());
        return a.left <= b.left && b.right <= a.right;
    """
    assert run(browser, seen), "the chosen frame is in the strip's window"
    save = os.environ.get("AUFAST_SCREENSHOTS")
    if save:
        browser.save_screenshot(str(Path(save) / "report-narrow.png"))
    browser.set_window_size(1100, 1000)
    browser.execute_async_script("setTimeout(arguments[0], 500)")
    if save:
        browser.save_screenshot(str(Path(save) / "report.png"))
    assert browser.get_log("browser") == []


# ---- without a browser ---------------------------------------------------------------------------


def test_the_page_holds_the_tables_numbers(page: Path) -> None:
    import csv

    data = content(page)
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    assert data["aus"] == [1, 4, 12] and len(data["times"]) == len(data["frames"]) == 10
    for face in data["faces"]:
        for k, au in enumerate(data["aus"]):
            found = {
                int(r["frame"]): r for r in rows if r["face_id"] == str(face["id"]) and r["success"] == "1"
            }
            for frame, p in enumerate(face["p"][k], 1):
                if frame in found:
                    assert p == pytest.approx(float(found[frame][f"AU{au:02d}_p"]), abs=6e-4)
                else:
                    assert p is None, "no line where there is no face"
    assert "two &lt;b&gt;faces &amp; more" in page.read_text()[:2000]


@pytest.mark.slow
def test_pages_of_thin_frames_stay_small(tmp_path: Path) -> None:
    """10 pixels high and 30,000 wide: neither the page nor what it shows blows up."""
    sink = ReportPage(tmp_path / "a.html", AUS, LabelConfig("unused", report=True), "thin", [])
    for k in range(2):
        sink.add(Seen(k, k / 30, blank(10, 30_000), []))
    sink.close()
    frames = content(tmp_path / "a.html")["frames"]
    assert len(frames) == 2 and all(len(f["picture"]) + len(f["thumb"]) < 200_000 for f in frames)


def test_long_videos_make_pages_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and points are thinned out as the video goes on, and a peak is never lost."""
    monkeypatch.setattr(report, "POINTS", 400)
    image = blank(48, 64)
    page = ReportPage(tmp_path / "a.html", AUS, LabelConfig("unused", report=True), "long", [])
    count, peak = 900, 501
    for k in range(count):
        face = FoundFace((0, 0, 9, 9), None, 1.0)
        face.probabilities = np.array([0.9 if k == peak else 0.1, 0.2])
        page.add(Seen(k, k / 30, image, [face]))
        assert len(page._frames) <= FRAMES and len(page._points) <= 400
    page.close()
    data = content(tmp_path / "a.html")
    (face,) = data["faces"]
    assert len(data["times"]) == count // 4 == len(face["p"][0]) and max(face["p"][0]) == 0.9
    assert data["times"][face["p"][0].index(0.9)] == pytest.approx(500 / 30, abs=1e-3)
    assert FRAMES / 2 <= len(data["frames"]) <= FRAMES and data["frames"][1]["index"] == 8
    assert {"each point is the largest of 4 frames", "one frame in 8 is shown"} <= set(data["facts"])


def test_a_title_cannot_end_the_script(tmp_path: Path) -> None:
    face = FoundFace((0, 0, 9, 9), None, 1.0)
    face.probabilities = np.array([0.5, 0.5])
    page = ReportPage(
        tmp_path / "a.html", AUS, LabelConfig("unused", report=True), "a</title>", ["</script><script>"]
    )
    page.add(Seen(0, None, blank(48, 64), [face]))
    page.close()
    assert content(tmp_path / "a.html")["facts"][0] == "</script><script>"
    assert "a</title>" not in (tmp_path / "a.html").read_text()
