"""A headless Chromium for tests of pages, or a skip with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """A driver with a window of 1280 x 1600 and a log of all requests."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    words = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"]
    words += ["disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1600"]
    for word in words:
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    page = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        page.set_page_load_timeout(120)
        yield page
    finally:
        page.quit()


def requested_hosts(page: Any) -> set[str]:
    """The hosts of all requests since the last call, also of those that were blocked."""
    hosts = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = urlsplit(message["params"]["request"]["url"])
            if address.scheme in ("http", "https", "ws", "wss"):
                hosts.add(address.hostname or "")
    return hosts


def until(page: Any, script: str, *, seconds: float = 120) -> Any:
    """The value of a JavaScript expression as soon as it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, seconds).until(lambda page: page.execute_script(f"return {script}"))
