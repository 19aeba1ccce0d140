"""Tokens of prompts and answers, with columns cut where a prompt is too long."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoext.tasks._kinds import MASKED, SEQ2SEQ
from zoext.tasks._prompts import Cuts, Prompt, longest_fit
from zoext.tasks._rows import IGNORED, Row
from zoext.tasks._templates import RowError

_Tokens = Sequence[int]


@dataclass
class Encoder:
    """Tokenises for a kind of model.

    Where a row is longer than ``max_length``, the longest column of its prompt loses its end, so that the
    rest of the template, the question, stays whole. So it does where a prompt leaves too few positions for
    the answer that is to be generated.

    Attributes:
        tokenizer: of transformers; it is copied, since calls change what it would save.
        kind: of the model, see ``kind_of``.
        max_length: tokens of a row; of a sequence-to-sequence model, of the input and of the answer each.
        positions: those of the model, which a prompt and the answer that it generates share; of a
            sequence-to-sequence model, those of the answer. None: no limit.
        cuts: what was cut so far.
    """

    tokenizer: Any
    kind: str
    max_length: int
    positions: int | None = None
    cuts: Cuts = field(default_factory=Cuts)

    def __post_init__(self) -> None:
        self.tokenizer = copy.deepcopy(self.tokenizer)
        self._before, self._after = self._specials()

    def _specials(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the tokenizer puts before and after a text."""
        plain = self.tokens_of(["a"])[0]
        whole = list(self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
        return (), ()

    def tokens_of(self, texts: Iterable[str]) -> list[list[int]]:
        """The tokens of texts, without special ones."""
        texts = list(texts)
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return rows

    def labelled(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[_Tokens, _Tokens]:
        """The tokens of ``text``, without special ones, and their labels: those within ``spans`` of it.

        ``text`` is tokenised as a whole, since tokenizers treat the beginning of a text in a special way. A
        token that reaches into a span belongs to it, and one that reaches out of it does not.
        """
        if getattr(self.tokenizer, "is_fast", False):
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            tokens, ends = found["input_ids"], [end for _, end in found["offset_mapping"]]
            within = [any(first < end <= last for first, last in spans) for end in ends]
        else:
            (tokens,) = self.tokens_of([text])
            places = [[_shared(tokens, self.tokens_of([text[:at]])[0]) for at in span] for span in spans]
            within = [any(first <= place < last for first, last in places) for place in range(len(tokens))]
        return tokens, [token if is_in else IGNORED for token, is_in in zip(tokens, within, strict=True)]

    @property
    def padding(self) -> int:
        """The token that fills rows up: any will do, as the attention mask and the labels exclude it."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in known if token is not None), 0)

    @property
    def mask(self) -> str:
        """The mask token of a masked model, "" for others."""
        return str(self.tokenizer.mask_token or "") if self.kind == MASKED else ""

    def most_before(self, new_tokens: int) -> int:
        """The longest prompt that leaves room for ``new_tokens``.

        Raises:
            ValueError: for more than the model has positions for, after a prompt of one token.
        """
        if self.positions is None:
            return self.max_length
        shared = self.kind != SEQ2SEQ
        if new_tokens > (most := self.positions - shared):
            raise ValueError(
                f"max_new_tokens must be at most {most}, as the model has {self.positions} positions, not "
                f"{new_tokens}"
            )
        return min(self.max_length, self.positions - new_tokens) if shared else self.max_length

    def texts(self, texts: Sequence[str], others: Sequence[str] | None = None) -> list[Row]:
        """Rows without labels: texts, or pairs with ``others``, as the tokenizer makes them."""
        if not texts:
            return []
        pairs = [(text,) for text in texts] if others is None else list(zip(texts, others, strict=True))
        rows = []
        for pair, whole in zip(pairs, self._whole(*zip(*pairs, strict=True)), strict=True):
            row = whole
            if len(whole.tokens) > self.max_length:
                (row,) = self._whole(*([each] for each in pair), truncation=True, max_length=self.max_length)
                self.cuts.count(len(whole.tokens), len(row.tokens))
            rows.append(row)
        return rows

    def _whole(self, *texts: Sequence[str], **options: Any) -> list[Row]:
        found = self.tokenizer(*map(list, texts), **{"truncation": False, **options})
        tokens = found["input_ids"]
        types = found.get("token_type_ids") if len(texts) > 1 else None
        return [
            Row(tuple(row), types=() if types is None else tuple(types[number]))
            for number, row in enumerate(tokens)
        ]

    def answered(self, prompts: Sequence[Prompt]) -> list[tuple[Row, ...]]:
        """The rows of each prompt, one for each of its answers, which are labelled.

        Raises:
            RowError: for a row that is too long even without its longest column.
        """
        texts = iter(
            self.tokens_of(self._text(prompt, each) for prompt in prompts for each in prompt.answers)
        )
        starts = self.tokens_of(prompt.text.rstrip(" ") for prompt in prompts)
        result = []
        for number, (prompt, start) in enumerate(zip(prompts, starts, strict=True), 1):
            rows = [self._answered(start, next(texts), prompt.ends) for _ in prompt.answers]
            result.append(self._fitting(prompt, rows, self._rows_of, number))
        return result

    def _text(self, prompt: Prompt, answer: str) -> str:
        """What is tokenised for an answer: with its prompt, unless a decoder begins with the answer."""
        return answer.strip() if self.kind == SEQ2SEQ else prompt.text + answer

    def asked(self, prompts: Sequence[Prompt]) -> list[tuple[Row, ...]]:
        """The rows of prompts that are to be answered, without labels.

        Raises:
            RowError: as ``answered``.
        """

        def rows_of(prompt: Prompt) -> Sequence[Row]:
            return [self._asked(self.tokens_of([prompt.text.rstrip(" ")])[0])]

        found = self.tokens_of(prompt.text.rstrip(" ") for prompt in prompts)
        return [
            self._fitting(prompt, [self._asked(tokens)], rows_of, number)
            for number, (prompt, tokens) in enumerate(zip(prompts, found, strict=True), 1)
        ]

    def _asked(self, prompt: _Tokens) -> Row:
        after = self._after if self.kind == SEQ2SEQ else ()
        return Row((*self._before, *prompt, *after))

    def _rows_of(self, prompt: Prompt) -> Sequence[Row]:
        start = self.tokens_of([prompt.text.rstrip(" ")])[0]
        texts = self.tokens_of(self._text(prompt, answer) for answer in prompt.answers)
        return [self._answered(start, tokens, prompt.ends) for tokens in texts]

    def _answered(self, prompt: _Tokens, found: _Tokens, ends: bool) -> Row:
        eos = self.tokenizer.eos_token_id
        if self.kind == SEQ2SEQ:
            end = (self._after or (() if eos is None else (eos,))) if ends else ()
            return Row((*self._before, *prompt, *self._after), (*self._before, *found, *end))
        prompt, answer = _split(prompt, found)
        tokens = (*self._before, *prompt, *answer, *((eos,) if ends and eos is not None else ()))
        unlabelled = len(self._before) + len(prompt)
        return Row(tokens, (IGNORED,) * unlabelled + tokens[unlabelled:])

    def masked(self, prompts: Sequence[Prompt], words: Sequence[str]) -> list[tuple[Row, ...]]:
        """The rows of prompts with one mask each, one for each word in its place.

        Raises:
            ValueError: for a word of several tokens, which one mask cannot stand for.
            RowError: as ``answered``.
        """
        tokens = [self._only_token(word) for word in words]

        def rows_of(prompt: Prompt) -> Sequence[Row]:
            return self._masked(self.tokens_of([prompt.text])[0], tokens)

        result = []
        for number, prompt in enumerate(prompts, 1):
            found = self.tokens_of([prompt.text])[0]
            if (count := found.count(self.tokenizer.mask_token_id)) != 1:
                raise RowError(
                    f"row {number}: has {count} mask tokens, {self.mask}, and needs the template's one"
                )
            result.append(self._fitting(prompt, self._masked(found, tokens), rows_of, number))
        return result

    def _masked(self, prompt: _Tokens, words: Sequence[int]) -> Sequence[Row]:
        whole = (*self._before, *prompt, *self._after)
        place = whole.index(self.tokenizer.mask_token_id)
        before, after = (IGNORED,) * place, (IGNORED,) * (len(whole) - place - 1)
        return [Row(whole, (*before, word, *after)) for word in words]

    def _only_token(self, word: str) -> int:
        tokens = self.tokens_of([word])[0]
        if len(tokens) != 1:
            pieces = " + ".join(self.tokenizer.convert_ids_to_tokens(tokens))
            raise ValueError(
                f"the word {word!r} has {len(tokens)} tokens, {pieces}, but a masked model predicts "
                "one; give another word"
            )
        return tokens[0]

    def _fitting(
        self,
        prompt: Prompt,
        rows: Sequence[Row],
        rows_of: Callable[[Prompt], Sequence[Row]],
        number: int,
    ) -> tuple[Row, ...]:
        """``rows`` of the prompt, or those of the longest part of it that fits."""
        before = self.most_before(prompt.room) if prompt.room else self.max_length

        def fits(some: Sequence[Row]) -> bool:
            return _size(some) <= self.max_length and _unlabelled(some) <= before

        if fits(rows):
            return tuple(rows)
        size, for_room = _size(rows), before < min(self.max_length, _unlabelled(rows))
        found = longest_fit(prompt, rows_of, fits)
        if found is None and for_room:
            raise RowError(
                f"row {number}: its prompt leaves no room for {prompt.room} new tokens, even without its "
                f"longest column: the model has {self.positions} positions; shorten the template, or "
                "generate fewer"
            )
        if found is None:
            raise RowError(
                f"row {number}: its prompt and answer take {size} tokens, and even without its longest "
                f"column more than the {self.max_length} that fit; shorten the template or the answer, or "
                "allow longer rows"
            )
        self.cuts.count(size, _size(found), for_room=for_room)
        return tuple(found)


def _size(rows: Sequence[Row]) -> int:
    return max(row.size for row in rows)


def _unlabelled(rows: Sequence[Row]) -> int:
    return max(row.unlabelled for row in rows)


def _split(prompt: _Tokens, whole: _Tokens) -> tuple[_Tokens, _Tokens]:
    """Splits the tokens of prompt and answer after those that they share with the prompt alone.

    At the seam a tokenizer may merge both, and then the merged token belongs to the answer. At least one
    token does.
    """
    shared = _shared(prompt, whole[:-1])
    return whole[:shared], whole[shared:]


def _shared(one: _Tokens, other: _Tokens) -> int:
    """The number of tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))
