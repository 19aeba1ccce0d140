"""Hooks of MkDocs: pages of the site that are files elsewhere in the repository, and links to them."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

#: Pages by the file that they are made of.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not below docs, and one for each example."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for example in sorted((ROOT / "examples").glob("*.py")):
        code = example.read_text(encoding="utf-8")
        text = f"# {example.name}\n\n```python\n{code}```\n"
        files.append(File.generated(config, f"examples/{example.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Makes links to files of the repository links to their pages."""
    path = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == path), f"docs/{path}")

    def linked(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        found = _normal(PurePosixPath(source).parent / target)
        if (there := _page_of(found)) is None:
            return match[0]
        depth = len(PurePosixPath(path).parts) - 1
        return f"]({'../' * depth}{there}{anchor})"

    return _LINK.sub(linked, markdown)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _page_of(found: str) -> str | None:
    if found in PAGES:
        return PAGES[found]
    if found.startswith("docs/"):
        return found.removeprefix("docs/")
    if found.startswith("examples/") and found.endswith(".py"):
        return found.removesuffix(".py") + ".md"
    return None
