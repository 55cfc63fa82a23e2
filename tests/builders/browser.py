"""A headless browser to show pages in."""

import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def dumped(url, profile, *options):
    """A page's process that has ended: the document after loading in `stdout`, the browser's log in `stderr`.

    Skips the test on a machine without a browser; what needs none of the page is tested besides.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser to show the page in: none of {', '.join(NAMES)} (on Debian: apt-get install chromium)")
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom")
    return subprocess.run([browser, *fixed, *options, url], capture_output=True, text=True, timeout=120, check=True)
