"""Models of many kinds, and a loss of each that takes the number of copies of its batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import zoext

WORDS = 37
Losses = Callable[[int], Tensor]


class Problem(NamedTuple):
    """A model, and its losses [copies] on copies of a batch."""

    model: nn.Module
    losses: Losses


class Mixed(nn.Module):
    """Modules of most kinds, shared positions, a tied table, dropout, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.positions = nn.Embedding(9, 12)
        self.norm = nn.LayerNorm(12)
        self.twice = nn.Linear(12, 12)
        self.drop = nn.Dropout(0.3)
        self.convolution = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.positions(torch.arange(x.shape[1]))
        h = self.twice(self.drop(self.twice(self.norm(h)).tanh()))
        return self.head(h + self.convolution(h.mT).mT)


class PositionsFirst(nn.Module):
    """Attention and a recurrent layer over tensors that begin with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.recurrent = nn.LSTM(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x).transpose(0, 1)
        h = self.encoder(self.attention(h, h, h)[0])
        h = self.recurrent(h)[0]
        return self.head(h).transpose(0, 1)


class Tokens(nn.Module):
    """A model that flattens its batch to tokens, and looks some of them up by rows of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 10, mode="sum")
        self.hidden = nn.Linear(10, 14)
        self.group = nn.GroupNorm(2, 14)
        self.head = nn.Linear(14, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.words(x.reshape(-1, 1)))
        return self.head(self.group(h)).view(*x.shape, WORDS)


def _words(rows: int = 3, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3, WORDS, (rows, length), generator=generator)


def _of_logits(model: nn.Module, x: Tensor, logits: Callable[[Any], Tensor]) -> Losses:
    def losses(copies: int) -> Tensor:
        batch = zoext.repeat({"x": x}, copies)["x"]
        out = logits(batch)[:, :-1].flatten(0, 1)
        each = functional.cross_entropy(out, batch[:, 1:].flatten(), reduction="none")
        return zoext.mean_per_copy(each, copies)

    return losses


def plain(kind: type[nn.Module], dtype: torch.dtype = torch.float64, train: bool = True) -> Problem:
    torch.manual_seed(3)
    model = kind().to(dtype).train(train)
    return Problem(model, _of_logits(model, _words(), model))


def causal(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Problem:
    """A random causal model of transformers, such as "Llama", with padding on the left."""
    import transformers

    common = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(3)
    config = getattr(transformers, f"{name.removesuffix('Text')}{'Text' * name.endswith('Text')}Config")
    kind = name.removesuffix("Text")
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config(**common, **options)).to(dtype).eval()
    x = _words()
    mask = torch.ones_like(x)
    mask[0, :2] = 0

    def logits(batch: Tensor) -> Tensor:
        return model(input_ids=batch, attention_mask=mask.repeat(len(batch) // len(x), 1)).logits

    return Problem(model, _of_logits(model, x, logits))


_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_GROUPED = {**_SMALL, "num_key_value_heads": 1, "head_dim": 8}
#: Causal models of transformers, by their names.
CAUSAL: dict[str, dict[str, Any]] = {
    "Llama": {**_GROUPED, "tie_word_embeddings": True},
    "Qwen3": _GROUPED,
    "Gemma3Text": _GROUPED,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "OPT": {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "word_embed_proj_dim": 8,
    },
}


class Parent(nn.Module):
    """A module with a weight of its own and children that have theirs, within another such module."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(8) * 0.1)
        self.words = nn.Embedding(WORDS, 8)
        self.inner = inner if inner is not None else Gate()
        self.head = nn.Linear(8, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.words(x) + self.shift))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.layer(h).tanh() * self.scale + h)


PLAIN = {"parents": Parent, "mixed": Mixed, "positions first": PositionsFirst, "tokens": Tokens}


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """The problem of a name in ``PLAIN`` or ``CAUSAL``."""
    if name in PLAIN:
        return plain(PLAIN[name], dtype)
    return causal(name, dtype, **CAUSAL[name])
