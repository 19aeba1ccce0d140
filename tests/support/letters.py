"""A tokenizer whose tokens are the letters, for tests that read what a model reads."""

from __future__ import annotations

from typing import Any

import torch


class Letters:
    """Token 0 pads and ends."""

    pad_token_id = eos_token_id = 0
    unk_token_id = None

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        single = isinstance(texts, str)
        rows = [[ord(letter) for letter in text] for text in ([texts] if single else texts)]
        return {"input_ids": rows[0] if single else rows}

    def batch_decode(self, rows: torch.Tensor, **options: Any) -> list[str]:
        return ["".join(chr(token) for token in row if token) for row in rows.tolist()]
