"""What several files of the project state, they state alike: the version, the papers, the linters."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import zoext

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
PYPROJECT = ROOT / "pyproject.toml"

pytestmark = pytest.mark.skipif(not PYPROJECT.exists(), reason="needs a checkout")


def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_version_has_one_source() -> None:
    document = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    assert document["project"]["dynamic"] == ["version"]
    assert document["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "zoext.__version__"}
    assert version("zoext") == zoext.__version__
    assert citation().get("version", zoext.__version__) == zoext.__version__


def test_the_citation_has_what_its_format_requires() -> None:
    document = citation()
    assert document["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= document.keys()
    assert document["license"] == tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["license"]
    for reference in document["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
        assert all({"given-names", "family-names"} == author.keys() for author in reference["authors"])
        (identifier,) = reference["identifiers"]
        assert identifier["type"] == "doi"


def test_the_papers_of_all_methods_are_cited() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    papers = set(re.findall(r"\b\d{4}\.\d{5}\b", page))
    cited = {reference["identifiers"][0]["value"] for reference in citation()["references"]}
    assert papers
    assert {f"10.48550/arXiv.{paper}" for paper in papers} <= cited


def test_make_installs_every_extra() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.search(r"^EXTRAS := (.*)$", makefile, re.MULTILINE)
    assert extras
    document = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    assert extras[1].split() == [*document["project"]["optional-dependencies"]]


def test_the_installation_page_has_every_extra() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    document = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    listed = re.findall(r"^\| `([\w-]+)` \|", page.split("## Extras")[1].split("\n## ")[0], re.MULTILINE)
    assert listed == [*document["project"]["optional-dependencies"]]


def test_pre_commit_runs_the_linters_of_make_lint() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    linters = re.search(r"^LINTERS := (.*)$", makefile, re.MULTILINE)
    assert linters
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = {hook["id"]: hook["entry"] for hook in repository["hooks"]}
    assert list(hooks) == linters[1].split()
    assert all(entry == f"make --no-print-directory lint-{name}" for name, entry in hooks.items())
    assert all(f"\nlint-{name}: " in makefile for name in hooks)


def test_github_reads_its_files() -> None:
    files = [path for path in (ROOT / ".github").rglob("*.yml") if path.name != "config.yml"]
    documents = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    workflow = documents.pop("release")
    assert {"sdist", "wheels", "release"} == workflow["jobs"].keys()
    for form in documents.values():
        assert {"name", "description", "body"} <= form.keys()
        assert all({"type", "attributes"} <= part.keys() for part in form["body"])
