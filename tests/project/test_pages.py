"""The pages hold: their programs run, their links lead somewhere, and the README is short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NOT_RUN = "<!-- not run:"

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the pages are not beside the tests")


def programs(page: Path) -> Iterator[str]:
    """The Python blocks of a page that it does not exempt, without their indentation in lists."""
    for before, indent, block in re.findall(
        r"([^\n]*)\n( *)```python\n(.*?)\n *```", page.read_text(), re.DOTALL
    ):
        if not before.startswith(NOT_RUN):
            yield "\n".join(line.removeprefix(indent) for line in block.splitlines())


class Model(nn.Module):
    """Returns its loss as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.body(x)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = Model().state_dict()

    def load_base() -> Model:
        model = Model()
        model.load_state_dict(base)
        return model

    loader = [{"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 0])} for _ in range(3)]
    for seed, name in enumerate("ab"):
        optimizer = zoext.MeZO(load := load_base(), seed=seed)
        with zoext.Trajectory(f"{name}.jsonl", optimizer):
            optimizer.step(lambda model=load: model(**loader[0]).loss)
    model = load_base()
    optimizer = zoext.MeZO(model)
    return {
        "torch": torch,
        "zoext": zoext,
        "model": model,
        "load_base": load_base,
        "loader": loader,
        "batch": loader[0],
        "micro_batches": loader[:2],
        "optimizer": optimizer,
    }


WITH_PROGRAMS = (
    *("choosing", "deferred", "hyperparameters", "questions"),
    *("usage", "batched", "losses", "methods", "precision", "trajectories", "packed", "design"),
)


@pytest.mark.parametrize("page", WITH_PROGRAMS)
def test_programs_run(page: str, names: dict[str, Any]) -> None:
    blocks = list(programs(ROOT / "docs" / f"{page}.md"))
    assert blocks
    for block in blocks:
        if "zoext.Trajectory" in block:  # recorded from the base on
            names["model"] = names["load_base"]()
            names["optimizer"] = zoext.MeZO(names["model"])
            Path("run.jsonl").unlink(missing_ok=True)
        names["prepared"] = SimpleNamespace(optimizer=names["optimizer"])
        exec(block.replace("to_step=1200", "to_step=2"), names)


def test_readme_learns(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = programs(ROOT / "README.md")
    exec(program, {})
    before, after = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert after < before / 10


def test_example_of_contributing_is_an_estimator(names: dict[str, Any]) -> None:
    (program,) = (block for block in programs(ROOT / "CONTRIBUTING.md") if "class OneSided" in block)
    exec(program, names)
    model, batch = names["model"], names["batch"]
    optimizer = zoext.ZerothOrderOptimizer(model, estimator=names["OneSided"]())
    optimizer.step(lambda: model(**batch).loss)
    known = zoext.ZerothOrderOptimizer(same := names["load_base"](), estimator=zoext.ForwardDifference())
    known.step(lambda: same(**batch).loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def without_blocks(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_are_where_the_page_says(page: Path) -> None:
    named = re.findall(r"`((?:benchmarks|csrc|docs|tests|tools|zoext)/[\w./-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_long_pages_list_their_sections(page: Path) -> None:
    """The site has a table of contents beside each page; other readers have the line at the top."""
    if page.name == "CHANGELOG.md" or len(page.read_text().split()) <= 1500:
        return
    text = without_blocks(page)
    listed = re.search(r"^Contents: .*?\.\n\n", text, re.MULTILINE | re.DOTALL)
    assert listed, "write a line 'Contents: [section](#section), ...' before the first section"
    sections = [anchor_of(heading) for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    assert re.findall(r"\(#([^)]+)\)", listed[0]) == sections


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000
