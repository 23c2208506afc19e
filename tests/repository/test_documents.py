"""What the pages of the repository point at is there: links, paths in backticks, make targets, layers, threats."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from package_map import COLUMN, lines, show
from threat_table import THREATS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hsl_node"
PAST = {"CHANGELOG.md"}  # names files as they were


def tracked() -> list[str]:
    """Files of the repository; where it is no checkout, those that lie there."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    hidden = re.compile(r"(^|/)(\.venv|\.git|build|hsl-demo|__pycache__)/")
    found = (str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file())
    return [name for name in found if not hidden.search(name)]


FILES = tracked()
PAGES = sorted(name for name in FILES if name.endswith(".md"))
PLACES = {p.name for p in ROOT.iterdir() if p.is_dir()} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}


def text_of(page: str) -> str:
    """Without fenced blocks: a picture or an example points at nothing."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)


def anchor(heading: str) -> str:
    """As the usual viewers of these pages make one."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def leads_somewhere(page: str, link: str) -> bool:
    name, _, section = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    if not section or not target.is_file():
        return target.exists() and not section
    return section in map(anchor, re.findall(r"^#+ (.+)$", target.read_text(), re.M))


def paths(text: str) -> set[str]:
    """What stands in backticks and looks like a path of this repository, from its top or from below hsl_node/."""
    found = set()
    for quoted in re.findall(r"`([^`\n]+)`", text):
        for word in re.findall(r"(?<![\w./~-])\.?[\w.-]+(?:/[\w.-]+)*/?", quoted):
            if (word.partition("/")[0] in PLACES and "/" in word) or re.fullmatch(r"\w+\.py", word):
                found.add(word)
    return found


def exists(path: str, page: str = "README.md") -> bool:
    """From the top, from below hsl_node/; on a page of the tests from below tests/."""
    if "/" not in path:
        return any(Path(name).name == path for name in FILES)
    tops = [ROOT, PACKAGE, *([ROOT / "tests"] if page.startswith("tests/") else [])]
    return any((top / path).exists() for top in tops)


def test_the_pages_are_found() -> None:
    """Else all below would hold of nothing."""
    assert {"README.md", "ARCHITECTURE.md", "docs/protocol.md", "tests/README.md", "deploy/README.md"} <= {*PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_to_files_and_headings(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text_of(page))
    assert [link for link in links if not leads_somewhere(page, link)] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p not in PAST])
def test_the_paths_that_a_page_names_are_there(page: str) -> None:
    assert sorted(path for path in paths(text_of(page)) if not exists(path, page)) == []


@pytest.mark.parametrize("page", [p for p in PAGES if p not in PAST])
def test_the_make_targets_that_a_page_names_are_there(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^    )make ([a-z-]+)", text_of(page), re.M)
    assert sorted(set(named) - targets) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_holds_nothing_that_a_merge_left(page: str) -> None:
    assert not re.findall(r"^(?:<<<<<<<|>>>>>>>)[^\n]*", (ROOT / page).read_text(), re.M)


def test_what_is_not_there_is_found() -> None:
    text = "`sync/nowhere.py` `nothing.py --x` [a](b) `tests/sync/no/such_test.py`, `inbox/r000012/`, `python3.12`"
    assert paths(text) == {"sync/nowhere.py", "nothing.py", "tests/sync/no/such_test.py"}
    assert not any(map(exists, paths(text)))
    assert not leads_somewhere("README.md", "nowhere.md") and not leads_somewhere(
        "README.md", "SECURITY.md#no-such-thing"
    )
    assert leads_somewhere("README.md", "SECURITY.md#supported-versions")
    assert exists("sync/round.py") and exists("round.py") and exists("hsl_node/sync")


def test_every_package_has_its_line_in_the_architecture() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## Packages")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", table, re.M)
    named = {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    packages = {str(p.parent.relative_to(PACKAGE)) for p in PACKAGE.rglob("__init__.py")} - {"."}
    assert named == packages | {"cli.py", "errors.py"}


def test_the_page_on_security_has_every_threat() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \| .+ \|$", (ROOT / "docs" / "security.md").read_text(), re.M)
    assert {int(number): title for number, title in rows} == THREATS


def test_the_map_has_every_file_and_what_it_promises() -> None:
    rows = list(lines())
    assert [left.strip() for left, text in rows if not text] == [], "a docstring says what a file promises"
    files = [left.strip() for left, _ in rows if left.endswith(".py")]
    assert len(files) == sum(p.name != "__init__.py" for p in PACKAGE.rglob("*.py"))
    assert max(len(left) for left, _ in rows) < COLUMN
    assert f"{'    round.py':<{COLUMN}}The whole round." in show(200)
