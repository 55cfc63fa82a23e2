"""What stands in the place of a file that was not really downloaded."""

from __future__ import annotations


def placeholder(head: bytes) -> str | None:
    """Return what a file's first bytes show to stand in the place of the file that was meant, None for nothing known.

    A clone without Git LFS leaves a pointer of three lines, a download without access the page that asks for a login.
    """
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not the file itself (was the download refused, or does it need a login?)"
    return None
