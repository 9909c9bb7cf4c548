"""The README stays short, and what it and the pages in `docs/` point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import streamllm

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def targets(page: Path) -> set[Path]:
    """The files and folders of this repository that links and images of a page name, outside of its code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text))
    return {(page.parent / link).resolve() for link in links if link and "://" not in link}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_exist(page):
    assert [str(target) for target in sorted(targets(page)) if not target.exists()] == []


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {target for page in new for target in targets(page) if target in PAGES} - reached
    assert set(PAGES) - reached == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys(), "what the format requires"
    assert found["version"] == streamllm.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and streamllm.__version__.removesuffix(".dev0") == newest[1]
