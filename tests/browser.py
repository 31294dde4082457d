"""A headless Chromium of the system for the tests, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Watched:
    """
    A page, and what went wrong on it.

    Attributes:
        page (`playwright.sync_api.Page`): the page.
        errors (`list[str]`): errors of its console, and exceptions that nobody caught.
        requests (`list[str]`): the addresses that it asked for.
    """

    def __init__(self, page):
        self.page, self.errors, self.requests = page, [], []
        page.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda asked: self.requests.append(asked.url))


@contextmanager
def browser() -> Iterator:
    """The browser, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield chromium
        finally:
            chromium.close()
