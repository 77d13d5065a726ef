"""What the tests of pages share."""

from playwright.sync_api import Page


def watched(page: Page) -> tuple[list[str], list[str]]:
    """Two lists that fill up: what the page writes to the console as an error, and what it asks for."""
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    return errors, requests
