"""The map in CONTRIBUTING.md is the tree, links lead somewhere, and private names are used in one place only."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mixture_of_depths"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")]
PRIVATE = re.compile(r"torch\._[a-z]\w*|transformers\.cli\b")


def test_the_map_has_one_line_for_every_file_and_no_other() -> None:
    (listing,) = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    named = [line.split()[0] for line in listing.splitlines()]
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(named) == sorted({*files, "__init__.py"})


def test_no_file_but_the_model_s_is_longer_than_500_lines() -> None:
    long = {path.name for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 500}
    assert long <= {"modeling.py"}


def test_private_modules_are_named_in_one_file_only() -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert users == {"compiler.py"}


def test_libraries_with_private_parts_in_use_have_bounds_and_this_run_is_at_one_end() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {required.name: required.specifier for required in map(Requirement, project["dependencies"])}
    for name in ("torch", "transformers", "accelerate"):
        installed = version(name)
        major, minor, *_ = (int(part) for part in re.findall(r"\d+", installed))
        assert installed in bounds[name]
        is_oldest, is_newest = (f"{major}.{minor + step}.0" not in bounds[name] for step in (-1, 1))
        assert is_oldest or is_newest, f"{name} {installed}: run the tests with the oldest or newest release allowed"


def headings(page: Path) -> set[str]:
    """The anchors that a Markdown page has."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"(?:\]\(|src=\"|href=\")([^)\"\s]+)", page.read_text()):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), link
