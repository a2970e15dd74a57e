"""The report in a real headless Chromium: every plot drawn, tooltips, narrow, dark, without pointer, and in print."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tasks import report
from tests.support import synthetic_results

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of the synthetic results, as a file."""
    folder = tmp_path_factory.mktemp("report")
    stage = synthetic_results.report_stage(folder, synthetic_results.write(folder))
    report.run(stage)
    return stage.output("report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))  # selenium downloads nothing
    yield driver
    driver.quit()


@contextlib.contextmanager
def emulated(browser, width=1280, scheme="light"):
    """A window of this width that prefers these colours."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def opened(browser, page):
    """The page with all its plots drawn; the names of the plots."""
    browser.get_log("browser")
    browser.get(page.as_uri())
    names = [each.get_attribute("data-plot") for each in browser.find_elements(By.CSS_SELECTOR, "[data-plot]")]
    drawn = "return document.querySelectorAll('[data-plot] svg').length"
    WebDriverWait(browser, 30).until(lambda _: browser.execute_script(drawn) == len(names))
    return names


def test_every_plot_is_drawn_and_the_console_is_silent(browser, page):
    with emulated(browser):
        names = opened(browser, page)
        assert len(names) > 10
        marks = "return [...document.querySelectorAll('[data-plot]')].map(p => p.querySelectorAll('.mark-symbol path, "
        marks += ".mark-rect path, .mark-line path, .mark-rule line').length)"
        assert all(count > 2 for count in browser.execute_script(marks))
        assert browser.get_log("browser") == []
        sizes = "return [...document.querySelectorAll('[data-plot] svg')].map(s => s.getBoundingClientRect().width)"
        assert min(browser.execute_script(sizes)) > 250


def test_a_tooltip_shows_the_figures_of_the_mark(browser, page):
    with emulated(browser):
        opened(browser, page)
        figure = browser.find_element(By.CSS_SELECTOR, "[data-plot='spec-perplexity-test']")
        points = figure.find_elements(By.CSS_SELECTOR, ".mark-symbol.role-mark path")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
        ActionChains(browser).move_to_element(points[0]).perform()
        shown = WebDriverWait(browser, 10).until(
            lambda _: browser.find_element(By.CSS_SELECTOR, "#vg-tooltip-element.visible")
        )
        assert re.search(r"stage\s+vocabulary", shown.text)  # which passed the fetched model on: it lies on top
        assert re.search(r"bytes\s+4,770,688", shown.text) and re.search(r"perplexity\s+3.1234", shown.text)


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_width_overflows(browser, page, width):
    with emulated(browser, width):
        opened(browser, page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        body = browser.execute_script("return getComputedStyle(document.querySelector('main p')).fontSize")
        assert float(body.removesuffix("px")) >= 14
        wide = "return [...document.querySelectorAll('[data-plot] svg')].map(s => s.getBoundingClientRect().right)"
        assert max(browser.execute_script(wide)) <= width


def test_dark_and_light_are_readable(browser, page):
    """WCAG 2's contrast of text and paper, 4.5 for body text."""
    for scheme in ("light", "dark"):
        with emulated(browser, scheme=scheme):
            opened(browser, page)
            for selector in (
                "main p",
                "main a",
                "main .soft",
                "td.no, td.yes",
                "thead th",
                "tr.final th",
                "tr.plain th",
            ):
                colours = browser.execute_script(COLOURS, selector)
                assert contrast(*colours) >= 4.5, (scheme, selector, colours)
    light, dark = 255, 20
    assert luminance(f"rgb({light}, {light}, {light})") > 0.9 > 0.1 > luminance(f"rgb({dark}, {dark}, {dark})")


COLOURS = """
const style = getComputedStyle, element = document.querySelector(arguments[0]);
let behind = element;
while (style(behind).backgroundColor === "rgba(0, 0, 0, 0)" && behind.parentElement) behind = behind.parentElement;
return [style(element).color, style(behind).backgroundColor];
"""


def luminance(colour):
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_what_scrolls_can_be_reached_without_a_pointer_and_has_a_name(browser, page):
    with emulated(browser, 390):
        opened(browser, page)
        for region in browser.find_elements(By.CSS_SELECTOR, ".scroll"):
            assert region.get_attribute("tabindex") == "0" and region.get_attribute("aria-label")
            assert region.aria_role == "region" or not region.is_displayed()  # in what is closed
        for plot in browser.find_elements(By.CSS_SELECTOR, "[data-plot]"):
            assert plot.aria_role == "graphics-document" and len(plot.accessible_name) > 20
        headings = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")
        assert headings[0] == "H1" and headings.count("H1") == 1
        ids = browser.execute_script("return [...document.querySelectorAll('section[id]')].map(s => s.id)")
        links = browser.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
        assert ids == links == [section.anchor for section in report.SECTIONS]


def test_print_holds_every_section_and_what_was_closed_and_cuts_no_table(browser, page):
    with emulated(browser):
        opened(browser, page)
        options = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69, "generateDocumentOutline": True}
        pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", options)["data"])
    titles = [title.decode("latin-1") for title in re.findall(rb"/Title \((.*?)\)", pdf)]
    assert [title for title in titles if title in {section.title for section in report.SECTIONS}] == [
        section.title for section in report.SECTIONS
    ]
    assert len(re.findall(rb"/Type /Page\b", pdf)) > 5


def test_on_paper_nothing_is_hidden_or_wider_than_the_sheet(browser, page):
    sheet = 703  # pixels of A4 between margins of 12 mm
    with emulated(browser, sheet):
        opened(browser, page)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        hidden = "return [...document.querySelectorAll('main td, main p')].filter(e => !e.checkVisibility()).length"
        assert browser.execute_script(hidden) == 0
        wide = "return [...document.querySelectorAll('table, svg, pre')].filter(e => "
        wide += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.textContent.slice(0, 60))"
        assert browser.execute_script(wide) == []
