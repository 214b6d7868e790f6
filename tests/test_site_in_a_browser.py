# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The site of `make docs` in a headless Chromium: nothing from outside, no error, all can be read and found."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from browsers import CHROMIUM, UNREADABLE, needs_chromium


sync_playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser").sync_playwright
SITE = Path(__file__).parents[1] / "build/site"
pytestmark = [needs_chromium, pytest.mark.skipif(not SITE.is_dir(), reason="build/site is made by `make docs`")]
PAGES = ["index", "docs/control", "docs/api", "docs/reproduction", "examples/index"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def visit(address):
    """`visit(**context)`: a page; in the end no console has said an error, nothing was asked of others."""
    errors, outside = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page(**context):
            page = browser.new_context(**context).new_page()
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            near = (address, "data:", "blob:")
            page.on("request", lambda one: None if one.url.startswith(near) else outside.append(one.url))
            return page

        yield open_page
        browser.close()
    assert errors == [] and outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_can_be_read(visit, address, scheme, width):
    for name in PAGES:
        page, weights = visit(viewport={"width": width, "height": 900}, color_scheme=scheme), []
        page.on("requestfinished", lambda one, weights=weights: weights.append(one.sizes()["responseBodySize"]))
        page.goto(f"{address}/{name}.html")
        page.wait_for_load_state("networkidle")
        print(f"{name}, {scheme}, {width} pixels: {sum(weights) / 1e6:.1f} MB in {len(weights)} requests")
        assert page.evaluate(UNREADABLE) == [], name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


def test_a_function_is_found(visit, address):
    page = visit(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/index.html")
    page.locator("input[name=query]").fill("visualize_grain_map")
    page.locator(".md-search-result__item a").first.click()
    page.wait_for_url("**/docs/api.html*")
