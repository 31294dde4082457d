"""Somebody who uses the page of the app in a browser."""

from pathlib import Path

import anndata as ad
from browser import Watched


# What the streams of gradio say of themselves at each upload.
OF_GRADIO = "Method not implemented."


class Visitor:
    """Somebody who has opened the page in a browser of their own."""

    def __init__(self, chromium, url: str):
        self.browser = chromium.new_context(viewport={"width": 1280, "height": 1000})
        self.watched, self.url = Watched(self.browser.new_page()), url
        self.page = self.watched.page
        self.page.set_default_timeout(20_000)
        self.page.goto(url)
        self.page.locator("#ask").wait_for()

    def upload(self, path: Path):
        self.page.locator("#upload input[type=file]").set_input_files(path)

    def choose(self, name: str, value: str):
        field = self.page.locator(f"#{name} input")
        field.fill(value)
        field.press("Enter")
        field.press("Tab")

    def ask(self):
        self.page.locator("#ask").click()

    def says(self, text: str, where: str = "#said"):
        self.page.locator(where).get_by_text(text).first.wait_for()

    def cells(self, to: Path) -> ad.AnnData:
        with self.page.expect_download() as download:
            self.page.locator("#download").click()
        assert download.value.suggested_filename == "predicted.h5ad"
        download.value.save_as(to)
        return ad.read_h5ad(to)

    def leave(self):
        # Nothing failed on the page, and it asked nobody else for anything.
        assert [error for error in self.watched.errors if error != OF_GRADIO] == []
        assert [asked for asked in self.watched.requests if not asked.startswith((self.url, "blob:", "data:"))] == []
        self.browser.close()
