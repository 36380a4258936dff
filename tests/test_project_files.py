"""The files around the code parse, and each version that stands in several files is the same in all of them."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from eventtrain import __version__

ROOT = Path(__file__).resolve().parent.parent
YAML_FILES = [
    ".github/ISSUE_TEMPLATE/bug_report.yml",
    ".github/ISSUE_TEMPLATE/config.yml",
    ".github/ISSUE_TEMPLATE/feature_request.yml",
    ".github/workflows/ci.yml",
    ".pre-commit-config.yaml",
    "CITATION.cff",
]
HOMEPAGE = "https://github.com/eventtrain/eventtrain"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(name: str) -> Any:
    return yaml.safe_load(text(name))


def pins(name: str) -> dict[str, str]:
    """Return the version of each package in a file of constraints."""
    lines = [line for line in text(name).splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), f"{name}: each line has the form package==version"
    return {package.lower(): version for package, version in (line.split("==") for line in lines)}


def numbers(version: str) -> tuple[int, ...]:
    """Return a version as numbers, without zeros at the end, so that 2.6 equals 2.6.0."""
    return tuple(int(number) for number in re.sub(r"(\.0)+$", "", version).split("."))


def floors(*sections: str) -> dict[str, str]:
    """Return the floor of each package that these sections of setup.cfg require, empty if there is none."""
    setup = configparser.ConfigParser()
    setup.read_string(text("setup.cfg"))
    extras = setup["options.extras_require"]
    requirements = [setup["options"]["install_requires"] if each == "install_requires" else extras[each] for each in sections]
    floors: dict[str, str] = {}
    for line in "\n".join(requirements).split():
        match = re.fullmatch(r"([\w.-]+?)(?:>=([\d.]+))?(?:,<[\d.]+)?", line)
        assert match is not None, line
        floors[match[1].lower()] = match[2] or ""
    return floors


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_files_parse(name: str) -> None:
    assert isinstance(parsed(name), dict)


def test_no_other_yaml_file_exists() -> None:
    """A new file belongs in the list above."""
    folders = [ROOT, ROOT / ".github", ROOT / ".github/workflows", ROOT / ".github/ISSUE_TEMPLATE"]
    names = [path for folder in folders for path in folder.iterdir() if path.suffix in (".yml", ".yaml", ".cff")]
    assert sorted(path.relative_to(ROOT).as_posix() for path in names) == YAML_FILES


def test_versions_agree() -> None:
    headings = re.findall(r"^## (.+)$", text("CHANGELOG.md"), flags=re.MULTILINE)
    matches = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)", each) for each in headings]
    assert None not in matches, f"each heading has the form [1.2.3] - 2026-01-31: {headings}"
    versions = [match[1] for match in matches if match is not None]
    assert versions[0] == __version__ and versions[-1] == "0.1.0"
    assert versions == sorted(versions, key=numbers, reverse=True)
    assert all(match is not None and match[2] != "Unreleased" for match in matches[1:]), "only the newest can be unreleased"
    assert [version for version in versions if f"\n[{version}]: https://" not in text("CHANGELOG.md")] == []


def test_the_citation_has_all_that_its_format_requires() -> None:
    citation = parsed("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["type"] == "software" and citation["license"] == "Apache-2.0"
    assert citation["title"] and citation["message"] and citation["authors"]
    assert citation["repository-code"] == HOMEPAGE


def test_hooks_have_the_versions_of_the_constraints() -> None:
    constraints = pins("constraints.txt")
    repositories = {each["repo"]: each for each in parsed(".pre-commit-config.yaml")["repos"]}
    ruff = repositories.pop("https://github.com/astral-sh/ruff-pre-commit")
    assert ruff["rev"] == f"v{constraints['ruff']}"
    assert {hook["id"] for hook in ruff["hooks"]} == {"ruff-check", "ruff-format"}
    # A local hook runs in the environment that the constraints made.
    (mypy,) = repositories.pop("local")["hooks"]
    assert (mypy["entry"], mypy["language"]) == ("mypy", "system") and "mypy" in constraints
    assert list(repositories) == ["https://github.com/pre-commit/pre-commit-hooks"]


def test_the_workflow_tests_all_versions_and_systems() -> None:
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    matrix = jobs["tests"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest"]
    assert [each["os"] for each in matrix["include"]] == ["windows-latest", "macos-latest"]
    classifiers = re.findall(r"Python :: (3\.\d+)$", text("setup.cfg"), flags=re.MULTILINE)
    assert matrix["python"] == classifiers == ["3.11", "3.12", "3.13"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["lint"] == ["make lint"]
    assert commands["tests"][-2:] == [
        'python -m pip install -c constraints.txt -e ".[examples,test,dev]"',
        'python -m pytest -m "not slow"',
    ]
    assert commands["floor"] == ["make floor"]
    assert commands["everything"] == [".ci/run"]


def test_floors_are_versions_that_are_tested() -> None:
    tested = {package: numbers(version) for package, version in pins("constraints-floor.txt").items()}
    stated = {package: numbers(floor) for package, floor in floors("install_requires", "examples", "test").items()}
    (build_system,) = re.findall(r'"setuptools>=([\d.]+)"', text("pyproject.toml"))
    assert {**stated, "setuptools": numbers(build_system)} == tested


def test_a_release_has_the_hash_of_each_pinned_package_but_torch() -> None:
    lines = [line for line in text("constraints-release.txt").splitlines() if not line.startswith("#")]
    hashed = [re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line) for line in lines]
    assert all(hashed), "each line has the form package==version --hash=sha256:..."
    versions = {match[1].lower().replace("_", "-"): match[2] for match in hashed if match is not None}
    pinned = {package.replace("_", "-"): version for package, version in pins("constraints.txt").items()}
    assert versions == {package: version for package, version in pinned.items() if package != "torch"}
    assert len({match[3] for match in hashed if match is not None}) == len(hashed)


def test_floors_of_developers_are_the_constraints() -> None:
    """Unless users need the package too, and it has an older floor."""
    constraints, tested = pins("constraints.txt"), pins("constraints-floor.txt")
    for package, floor in floors("bench", "dev").items():
        expected = tested.get(package, constraints[package])
        assert not floor or expected.startswith(floor), package


def test_links_to_the_project_have_one_address() -> None:
    pages = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md", "CITATION.cff", "setup.cfg"]
    for name in [*pages, ".github/ISSUE_TEMPLATE/config.yml"]:
        for address in re.findall(r"https?://[^\s>)\"]*eventtrain[^\s>)\"]*", text(name)):
            assert address.startswith(HOMEPAGE), f"{name}: {address}"
            page = re.match(rf"{HOMEPAGE}/(?:blob|tree)/main/(.+)", address)
            assert page is None or (ROOT / page[1]).exists(), f"{name}: {address}"
