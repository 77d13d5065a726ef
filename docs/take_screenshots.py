"""Takes the pictures of pages that the docs show, in Debian's chromium.

mod demo
python docs/take_screenshots.py demo/report.html docs/images
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    page_path, folder = (Path(word).absolute() for word in sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, width, height, scheme in (("report", 1280, 900, "light"), ("report-small", 400, 800, "dark")):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(page_path.as_uri())
            page.locator("#text span[data-i='40']").hover()
            page.screenshot(path=folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
