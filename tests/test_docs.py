"""Links and file names in the docs lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target, anchor in LINK.findall(page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(found), f"{target} has no heading {anchor}"


def test_every_page_is_in_the_list_of_pages():
    listed = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in listed} == set()


def test_the_map_of_the_house_names_what_is_there():
    drawn = (ROOT / "README.md").read_text().split("```\npsa_fast/\n")[1].split("```")[0]
    names = [(line.startswith("  "), line.split()[0]) for line in drawn.splitlines()]
    for inside, name in names:
        assert (ROOT / ("psa_fast" if inside else "") / name).exists(), name
    shown = {name.removesuffix("/").removesuffix(".py") for inside, name in names if inside}
    rooms = {path.parent.name for path in (ROOT / "psa_fast").glob("*/__init__.py")}
    assert rooms <= shown
