"""The documents are true: links and paths lead to files, the map of rooms is complete, and the English is plain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING, CHANGELOG = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"
PAGES = [README, CONTRIBUTING, CHANGELOG, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FOLDERS = ("eventtrain", "callbacks", "tests", "docs", "examples", "benchmarks")
WRITTEN_BY_RUNS = re.compile(r"\.(?:ckpt|jsonl)$|^train\.py$")
"""Paths in documents that are not files of the repository: runs or users write them."""


def without_code(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Return the relative links of a page, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    return [target.partition("#")[0] for target in targets if not re.match(r"https?:|mailto:|#", target)]


def paths(page: Path) -> list[str]:
    """Return the words in backticks that look like files or folders of the repository."""
    words = re.findall(r"`([\w./-]+)`", without_code(page.read_text()))
    return [word for word in words if is_path(word) and not WRITTEN_BY_RUNS.search(word)]


def is_path(word: str) -> bool:
    """Return whether a word looks like a file or a folder of the repository."""
    in_a_folder = "/" in word and word.split("/")[0] in FOLDERS
    return in_a_folder or bool(re.search(r"\w\.(?:py|pyi|md|cfg|toml|txt|cff|html|json)$", word))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(word: str, page: Path) -> bool:
    """Return whether a path exists: below the root, beside the page, in the package, or as the name of any file."""
    if any((base / word).exists() for base in (ROOT, page.parent, ROOT / "eventtrain")):
        return True
    return "/" not in word and any(any((ROOT / folder).rglob(word)) for folder in FOLDERS)


@each_page
def test_relative_links_lead_to_files(page: Path) -> None:
    assert [link for link in links(page) if link and not (page.parent / link).exists()] == []


@each_page
def test_anchors_of_links_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([\w./-]*\.md)?#([\w-]+)\)", without_code(page.read_text()))
    assert [(to, name) for to, name in targets if name not in anchors(page.parent / to if to else page)] == []


@each_page
def test_paths_in_backticks_exist(page: Path) -> None:
    assert [path for path in paths(page) if not exists(path, page)] == []


def test_a_wrong_link_path_or_anchor_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`: here\n[a](b.md) [c](d.md#e) [f](https://x.org/g.md)\n`core/nowhere.py` `tests/none/` `last.ckpt`\n"
    )
    assert links(page) == ["b.md", "d.md"]
    assert paths(page) == ["core/nowhere.py", "tests/none/"]
    assert not exists("core/nowhere.py", page) and exists("core/loop.py", page) and exists("gradient_clipping.py", page)
    assert anchors(page) == {"a-title-here"}


# ------------------------------------------------------------------ the map of rooms


def rooms(folder: Path) -> list[str]:
    """Return the packages in a folder."""
    return sorted(path.parent.name for path in folder.glob("*/__init__.py") if not path.parent.is_symlink())


def test_the_map_in_the_readme_names_each_room_once() -> None:
    section = README.read_text().split("\n## Rooms\n")[1].split("\n## ")[0]
    lines = section.split("```text\n")[1].split("```")[0].splitlines()
    assert len(lines) == 10
    names = [re.findall(r"(\w+)/", line) for line in lines]
    (library,) = [at for at, line in enumerate(lines) if line.startswith("eventtrain/")]
    (callbacks,) = [at for at, line in enumerate(lines) if line.startswith("callbacks/")]
    assert sorted(name for line in names[library + 1 : callbacks] for name in line) == rooms(ROOT / "eventtrain")
    assert sorted(name for line in names[callbacks + 1 :] for name in line) == rooms(ROOT / "callbacks")


# ------------------------------------------------------------------ language

MOST = {"what": 4.0, "where": 4.0, "at hand": 0.0, "inside of": 0.0}
"""How often a phrase may occur in 1,000 words."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "SECURITY.md"], ids=lambda page: page.name)
def test_the_english_is_plain(page: Path) -> None:
    text = page.read_text()
    words = len(re.findall(r"[A-Za-z']+", text))
    rates = {phrase: 1000 * len(re.findall(rf"\b{phrase}\b", text, re.IGNORECASE)) / words for phrase in MOST}
    assert {phrase: rate for phrase, rate in rates.items() if rate > MOST[phrase]} == {}
