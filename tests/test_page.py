"""The report in a real browser: headless Chromium opens the page as a reader would, with text that attacks it."""

import shutil
import time
from ctypes.util import find_library
from pathlib import Path

import pytest

from tests import pages

CONTRAST = Path(__file__).with_name("contrast.js").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Debian's Chromium and the library that Playwright's Node.js needs, installed if root may.

    For this module only: while Playwright runs, no other test can use an event loop.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    from tests.machine import Unavailable, install

    there = {"chromium": shutil.which("chromium"), "libatomic1": find_library("atomic")}
    try:
        if missing := [package for package, found in there.items() if not found]:
            install(*missing, log=tmp_path_factory.mktemp("apt") / "log")
    except Unavailable as error:
        pytest.skip(str(error))
    with playwright.sync_playwright() as driver:
        # root has no sandbox in Chromium; the page is our own, and its policy is what is tested
        one = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=120_000)
        yield one
        one.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(pages.whole_page(), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser, file):
    """Opens the page; at the end of the test nothing was requested and nothing was complained about."""
    contexts, requests, complaints = [], [], []

    def go(width=1280, scheme="light", path=file, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda one: requests.append(one.url))
        page.on("console", lambda one: complaints.append(one.text))
        page.on("pageerror", lambda one: complaints.append(str(one)))
        page.on("dialog", lambda one: complaints.append(f"dialog: {one.message}"))
        page.goto(path.as_uri())
        return page

    yield go
    for one in contexts:
        one.close()
    assert set(requests) == {file.as_uri()}
    assert complaints == []


def shown(page):
    return page.locator(".row:not([hidden])").evaluate_all("rows => rows.map(row => Number(row.dataset.task))")


def test_nothing_is_loaded_and_foreign_text_stays_text(visit):
    page = visit()
    assert page.locator("script").count() == 1
    assert page.locator("img, iframe, link, object, base").count() == 0
    page.locator(".row > summary").first.click()
    assert pages.ATTACK in page.locator(".row").first.inner_text()
    assert "\u27e8U+202E\u27e9" in page.locator(".row").first.inner_text()
    assert "\u202e" not in page.content()


def test_search_filter_and_order(visit):
    page = visit()
    every = shown(page)
    assert every == list(range(7, 19))
    search = page.get_by_label("Search task, prompt, code")
    search.fill("12")
    assert shown(page) == [12]
    assert page.locator("#count").inner_text() == "1 of 12 problems"
    search.fill("def f13 lru_cache")  # in programs that are not open
    assert shown(page) == [13]
    search.fill("nowhere")
    assert shown(page) == []
    search.press("Enter")  # the form goes nowhere
    search.fill("")
    kinds = {}
    for kind in ("wins", "loses", "same"):
        page.locator("#which").select_option(kind)
        kinds[kind] = shown(page)
    assert sorted(task for tasks in kinds.values() for task in tasks) == every
    assert all(kinds.values())
    page.locator("#which").select_option("all")
    page.locator("#order").select_option("hard")
    rates = page.locator(".row").evaluate_all("rows => rows.map(row => Number(row.dataset.rate))")
    assert rates == sorted(rates)
    assert len(set(rates)) > 3


def test_a_row_opens_by_keyboard_to_three_programs(visit):
    page = visit()
    row = page.locator(".row[data-kind=wins]").first
    row.locator("> summary").focus()
    page.keyboard.press("Enter")
    programs = row.locator(".program")
    assert programs.count() == 3
    assert [programs.nth(i).is_visible() for i in range(3)] == [True] * 3
    assert "the critic's pick" in programs.nth(0).inner_text()
    assert programs.nth(1).locator(".mark").inner_text() == "passed"
    assert programs.nth(2).locator(".mark").inner_text() != "passed"
    assert len({programs.nth(i).locator("code").inner_text() for i in range(3)}) == 3
    colours = (
        programs.nth(0).locator("code span[class]").evaluate_all("all => all.map(one => getComputedStyle(one).color)")
    )
    assert len(set(colours)) >= 5


def test_the_page_never_scrolls_sideways(visit):
    widths = {}
    for width in (360, 768, 1280):
        page = visit(width)
        page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        widths[width] = page.evaluate("document.documentElement.scrollWidth")
    assert widths == {360: 360, 768: 768, 1280: 1280}


def test_text_has_enough_contrast_in_both_schemes(visit):
    for scheme in ("light", "dark"):
        page = visit(scheme=scheme)
        page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 30
        assert {name: round(ratio, 2) for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_the_dark_scheme_has_its_own_colours(visit):
    look = "() => ['body', 'svg text', 'code span[class]'].map(q => { const s = getComputedStyle(document.querySelector(q));"
    look += " return [s.color, s.fill, s.backgroundColor].join(); })"
    light, dark = visit(scheme="light").evaluate(look), visit(scheme="dark").evaluate(look)
    assert all(one != other for one, other in zip(light, dark, strict=True))


def test_everything_can_be_read_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert not page.locator("#tools").is_visible()
    row = page.locator(".row").nth(3)
    row.locator("> summary").click()
    assert row.locator(".program code").first.is_visible()
    page.get_by_text("The run's manifest in full").click()
    assert '"name": "toy"' in page.locator("footer pre").last.inner_text()


def test_every_control_and_region_has_a_name(visit):
    page = visit()
    unnamed = page.locator("input, select, output, nav, section, [role=region], svg, pre[tabindex]").evaluate_all(
        "all => all.filter(one => !(one.labels?.length || one.ariaLabel || one.getAttribute('aria-labelledby') || one.id === 'count'))"
        ".map(one => one.outerHTML.slice(0, 80))"
    )
    assert unnamed == []
    dangling = "all => all.map(one => one.getAttribute('aria-labelledby')).filter(id => !document.getElementById(id))"
    assert page.locator("[aria-labelledby]").evaluate_all(dangling) == []
    gone = "all => all.map(one => one.hash.slice(1)).filter(id => !document.getElementById(id))"
    assert page.locator("a").evaluate_all(gone) == []


def test_five_hundred_problems_are_one_light_page(browser, tmp_path):
    """Below 10 MB also where programs are long, and on the screen in seconds."""
    text = pages.whole_page(500, 4, words="x = [1, 'a', 2.5]  # long\n" * 400, repeat=20)
    assert len(text.encode()) < 10_000_000
    assert text.count('class="program"') > 1000
    path = tmp_path / "index.html"
    path.write_text(text, encoding="utf-8")
    page = browser.new_page()
    begin = time.monotonic()
    page.goto(path.as_uri())
    page.get_by_label("Search task, prompt, code").fill("f100")
    assert page.locator("#count").inner_text() == "1 of 500 problems"
    assert time.monotonic() - begin < 60  # a page that hangs, on any machine
    page.close()
