"""The reference of the site has every public name once, and no other."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import zoext

PAGES = Path(__file__).parents[2] / "docs" / "reference"

#: Names that are constants of few words, which the pages of their modules explain.
CONSTANTS = {"CAUSAL", "CLASSIFIER", "ENCODER", "IGNORED", "MASKED", "SEQ2SEQ", "PRESETS", "TRAINS"}
#: Names of types, of which there is nothing more to say.
TYPES = {"Batch", "Record"}

pytestmark = pytest.mark.skipif(not PAGES.is_dir(), reason="the pages are not beside the tests")


def referenced() -> list[str]:
    return [
        name
        for page in sorted(PAGES.glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]


def public(module: ModuleType) -> dict[str, Any]:
    names = set(module.__all__) - CONSTANTS - TYPES
    return {name: value for name in names if not isinstance(value := getattr(module, name), ModuleType)}


def resolved(path: str) -> Any:
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


@pytest.mark.parametrize("module", ["zoext", "zoext.tasks", "zoext.losses"])
def test_every_public_name_has_an_entry(module: str) -> None:
    entries = {id(resolved(name)) for name in referenced() if not name.startswith("zoext.integrations")}
    missing = [name for name, value in public(import_module(module)).items() if id(value) not in entries]
    assert missing == []


def test_each_has_one_entry() -> None:
    names = referenced()
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [name for name in referenced() if "integrations" not in name])
def test_entries_exist_and_say_something(name: str) -> None:
    assert len((resolved(name).__doc__ or "").strip()) > 20


def test_all_names_are_still_there() -> None:
    assert {"MeZO", "AGZO", "tasks"} <= set(zoext.__all__)
