"""Templates and rows of data become the tokens that a model reads, with labels on the answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, T5Config

from support.tiny_models import tiny_language_model
from zoext import tasks
from zoext.tasks import IGNORED, Encoder, Example, LabelWords, RowError, Template

WORDS = ("Review:", "Sentiment:", "is", "it", "not", "at", "all")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ("causal", "masked", "seq2seq")
    parent = tmp_path_factory.mktemp("models")
    return {kind: tiny_language_model(parent / kind, kind, words=WORDS) for kind in kinds}


def encoder(folders: dict[str, Path], kind: str, max_length: int = 40) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(folders[kind]), kind, max_length)


def said(encoder: Encoder, example: Example) -> list[tuple[str, str]]:
    """Per row what is read, and what is labelled."""
    found = []
    for row in example.rows:
        labels = [label for label in row.labels if label != IGNORED]
        found.append((encoder.tokenizer.decode(row.tokens), encoder.tokenizer.decode(labels)))
    return found


ROWS: list[dict[str, Any]] = [{"text": "the day was kind", "label": 1}, {"text": "grim", "label": 0}]
TASK = LabelWords("Review: {text} Sentiment:", {"0": " cruel", "1": " not grim"})


def test_a_causal_model_reads_prompt_and_answer(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "causal")
    first, second = TASK.examples(ROWS, ours)
    start = "Review: the day was kind Sentiment:"
    assert said(ours, first) == [(f"{start} cruel", "cruel"), (f"{start} not grim", "not grim")]
    assert (first.label, second.label) == (1, 0)
    assert all(len(row.labels) == len(row.tokens) for row in first.rows)
    assert said(ours, second)[0] == ("Review: grim Sentiment: cruel", "cruel")


def test_a_sequence_to_sequence_model_reads_the_prompt(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "seq2seq")
    first = TASK.examples(ROWS, ours)[0]
    start = "Review: the day was kind Sentiment:"
    assert said(ours, first) == [(start, "cruel"), (start, "not grim")]


def test_a_masked_model_fills_the_mask(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "masked")
    task = LabelWords("{text} is {mask} at all", {"no": "cruel", "yes": "sweet"})
    (example,) = task.examples([{"text": "the cat", "label": "yes"}], ours)
    text = "the cat is [MASK] at all"
    assert said(ours, example) == [(text, "cruel"), (text, "sweet")]
    assert example.label == 1
    assert [row.labels.index(row.labels[3]) for row in example.rows] == [3, 3]


def test_the_longest_column_is_cut_and_the_question_stays(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "causal", max_length=9)
    task = LabelWords("Review: {text} is {other} Sentiment:", {"0": " cruel", "1": " not grim"})
    row = {"text": "the day was so very very kind", "other": "so sweet", "label": 0}
    (example,) = task.examples([row], ours)
    start = "Review: the day is so sweet Sentiment:"
    assert said(ours, example) == [(f"{start} cruel", "cruel"), (f"{start} not grim", "not grim")]
    assert max(len(each.tokens) for each in example.rows) == 9
    assert (ours.cuts.rows, ours.cuts.tokens, ours.cuts.lost) == (1, 14, 5)


def test_a_row_that_fits_is_not_counted_as_cut(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "causal", max_length=8)
    TASK.examples(ROWS, ours)
    assert ours.cuts.rows == 0


@pytest.mark.parametrize(("kind", "size"), [("causal", 5), ("seq2seq", 4)])
def test_a_template_that_is_too_long_by_itself(folders: dict[str, Path], kind: str, size: int) -> None:
    task = LabelWords("{text} so so so", {"0": " cruel", "1": " kind"})
    with pytest.raises(RowError, match=f"row 1: its prompt and answer take {size} tokens.*more than the 2"):
        task.examples([{"text": "the", "label": 1}], encoder(folders, kind, max_length=2))


def test_completions_end(folders: dict[str, Path]) -> None:
    rows = [{"prompt": "the day was ", "completion": "so kind"}]
    for kind in ("causal", "seq2seq"):
        ours = encoder(folders, kind)
        ((read, labelled),) = said(ours, tasks.Completion().examples(rows, ours)[0])
        assert labelled == "so kind [EOS]"
        assert read == ("the day was so kind [EOS]" if kind == "causal" else "the day was")


def test_choices_of_each_row(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "causal")
    task = tasks.MultipleChoice("{question} is it", choices="options", answer="right")
    rows = [
        {"question": "the cat", "options": ["kind", "not kind", "sweet"], "right": 1},
        {"question": "the day", "options": ["grim", "so sour"], "right": "so sour"},
        {"question": "the day", "options": ["grim", "sour", "cruel"], "right": ["cruel", "grim"]},
    ]
    examples = task.examples(rows, ours)
    assert [(each.label, each.also_right) for each in examples] == [(1, ()), (1, ()), (2, (0,))]
    assert [labelled for _, labelled in said(ours, examples[0])] == ["kind", "not kind", "sweet"]


def test_whole_conversations(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "causal")
    ours.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Review: {{ m.content }} {% else %}Sentiment: "
        "{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}Sentiment: {% endif %}"
    )
    messages = [("user", "the day"), ("assistant", "kind"), ("user", "the cat"), ("assistant", "not kind")]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    (example,) = tasks.Chat().examples([row], ours)
    read = "Review: the day Sentiment: kind Review: the cat Sentiment: not kind"
    assert said(ours, example) == [(read, "kind not kind")]


def test_a_tokenizer_without_a_chat_template(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no chat template; give a model that was tuned for chats"):
        tasks.Chat().examples([], encoder(folders, "causal"))


def test_special_tokens_surround_a_prompt() -> None:
    """As BERT's [CLS] and [SEP]; a causal tokenizer's last one would end the text before the answer."""

    class Tokenizer:
        pad_token_id = eos_token_id = 9
        unk_token_id = None

        def __call__(self, texts: Any, add_special_tokens: bool = True, **options: Any) -> Any:
            if isinstance(texts, str):
                return {"input_ids": self([texts], add_special_tokens)["input_ids"][0]}
            rows = [[len(word) for word in text.split()] for text in texts]
            return {"input_ids": [[0, *row, 9] for row in rows] if add_special_tokens else rows}

    task = LabelWords("{text} asks", {"a": " bb", "b": " ccc"})
    rows = [{"text": "dddd eeeee", "label": "a"}]
    (example,) = task.examples(rows, Encoder(Tokenizer(), "causal", 20))
    assert example.rows[1].tokens == (0, 4, 5, 4, 3)
    (example,) = task.examples(rows, Encoder(Tokenizer(), "seq2seq", 20))
    assert (example.rows[1].tokens, example.rows[1].labels) == ((0, 4, 5, 4, 9), (0, 3))  # BART begins so


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{text", "write {{ and }} for braces"),
        ("{text.lower}", "{text.lower} must be the name of a column"),
        ("{text:>3}", "must be the name of a column"),
        ("{0}", "must be the name of a column"),
        ("{}", "must be the name of a column"),
    ],
)
def test_a_template_with_wrong_braces(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Template(text)


def test_braces_in_a_template(folders: dict[str, Path]) -> None:
    template = Template("{{the}} {text} {year}")
    assert template.columns == ("text", "year")
    pieces = template.pieces({"text": "naïve “so”", "year": 1984})
    assert "".join(piece.text for piece in pieces) == "{the} naïve “so” 1984"


@pytest.mark.parametrize(
    ("words", "template", "expected"),
    [
        ({"0": " a"}, "{text}", "two labels or more"),
        ({"0": " a", "1": "a "}, "{text}", "a word of its own"),
        ({"0": " a", "1": " "}, "{text}", "a word of its own"),
        ({"0": " a", "1": " b"}, "Review:", "needs a column in braces"),
        ({"0": " a", "1": " b"}, "{text} {label}", "tells the answer"),
    ],
)
def test_label_words_that_tell_nothing(words: dict[str, str], template: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LabelWords(template, words)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "so", "label": 7}, "row 2: label is 7, which has no label word; there are words for 0, 1"),
        ({"text": " ", "label": 1}, "row 2: text is ' ', not a text; correct or remove the row"),
        ({"text": None, "label": 1}, "row 2: text is None"),
        ({"label": 1}, "row 2: no column 'text'; it has label"),
    ],
)
def test_rows_that_cannot_be_asked(folders: dict[str, Path], row: dict[str, Any], expected: str) -> None:
    with pytest.raises(RowError, match=expected):
        TASK.examples([ROWS[0], row], encoder(folders, "causal"))


def test_a_masked_model_and_words_of_several_tokens(folders: dict[str, Path]) -> None:
    task = LabelWords("{text} {mask}", {"0": "not kind", "1": "kind"})
    with pytest.raises(ValueError, match=r"'not kind' has 2 tokens, not \+ kind, but a masked"):
        task.examples(ROWS, encoder(folders, "masked"))


@pytest.mark.parametrize(("kind", "template"), [("masked", "{text}"), ("causal", "{text} {mask}")])
def test_the_mask_belongs_to_masked_models(folders: dict[str, Path], kind: str, template: str) -> None:
    with pytest.raises(ValueError, match="mask"):
        LabelWords(template, {"0": "cruel", "1": "kind"}).examples(ROWS, encoder(folders, kind))


@pytest.mark.parametrize(
    ("kind", "expected"), [("masked", "an encoder sees"), ("seq2seq", "prompt and completion")]
)
def test_plain_text_is_for_causal_models(folders: dict[str, Path], kind: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        tasks.Text().examples(ROWS, encoder(folders, kind))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GPT2Config(architectures=["GPT2LMHeadModel"]), "causal"),
        (LlamaConfig(architectures=["LlamaForCausalLM"]), "causal"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "classifier"),
        (LlamaConfig(), "causal"),
        (BertConfig(architectures=["BertForMaskedLM"]), "masked"),
        (BertConfig(architectures=["BertForPreTraining"]), "masked"),
        (BertConfig(architectures=["BertModel"]), "encoder"),
        (BertConfig(architectures=["BertForSequenceClassification"]), "classifier"),
        (BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), "causal"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "seq2seq"),
    ],
)
def test_kinds_of_models(config: Any, kind: str) -> None:
    assert tasks.kind_of(config) == kind
    without_head = {"Llama": "causal", "Bert": "masked"}
    if kind == "classifier":
        assert tasks.language_kind_of(config) == without_head[type(config).__name__.removesuffix("Config")]


def test_pairs_of_texts_for_a_head(tmp_path: Path) -> None:
    """As the tokenizer makes them: a BERT tells the texts of a pair apart by their token types."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "day", "was", "kind"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    ours = Encoder(tokenizer, "encoder", 8)
    task = tasks.Classification(["no", "yes"], text=("a", "b"))
    rows = [
        {"a": "the day", "b": "was kind", "label": "yes"},
        {"a": "kind", "b": "the day was kind", "label": "no"},
    ]
    examples = task.examples(rows, ours)
    batch = task.objective(ours).collate(examples)
    wanted = tokenizer(
        ["the day", "kind"], ["was kind", "the day was kind"], padding=True, return_tensors="pt"
    )
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].tolist() == wanted[name].tolist(), name
    assert batch["labels"].tolist() == [1, 0]
    (alone,) = tasks.Classification(["no", "yes"]).examples([{"text": "the day", "label": "no"}], ours)
    assert alone.rows[0].types == ()
    short = Encoder(tokenizer, "encoder", 6)
    (cut,) = task.examples(rows[1:], short)
    assert (len(cut.tokens), len(cut.rows[0].types), short.cuts.rows) == (6, 6, 1)


def test_a_decoder_begins_with_the_answer() -> None:
    """The tokens of the answer alone: not those that follow the last word of the prompt."""

    class Pairs:
        """A tokenizer that merges two letters, also across a space."""

        pad_token_id, eos_token_id, unk_token_id = 0, 1, None

        def __call__(self, texts: Any, add_special_tokens: bool = True, **options: Any) -> Any:
            if isinstance(texts, str):
                return {"input_ids": self([texts], add_special_tokens)["input_ids"][0]}
            rows = [
                [2 + ord(pair[0]) for pair in zip(text[::2], text[1::2] + " ", strict=False)]
                for text in texts
            ]
            return {"input_ids": [[*row, 1] for row in rows] if add_special_tokens else rows}

    (example,) = tasks.Completion("{text}", completion="more", joint=" ").examples(
        [{"text": "abc", "more": "defg"}], Encoder(Pairs(), "seq2seq", 20)
    )
    (row,) = example.rows
    assert row.tokens == (2 + ord("a"), 2 + ord("c"), 1)
    assert row.labels == (2 + ord("d"), 2 + ord("f"), 1)


@pytest.mark.parametrize(
    ("text", "joint"),
    [("Answer:", " "), ("Answer: ", " "), ("Yes or no?\n", ""), ('It is "', " "), ("{a} {mask}.", " ")],
)
def test_what_separates_an_answer(text: str, joint: str) -> None:
    template = Template(text)
    assert template.joint == joint
    assert not template.text.endswith(" ")


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_words_that_the_tokenizer_does_not_know(folders: dict[str, Path], kind: str) -> None:
    template = "{text} {mask}" if kind == "masked" else "{text}"
    task = LabelWords(template, {"0": " dreadful", "1": " superb"})
    with pytest.raises(ValueError, match="does not know ' dreadful'"):
        task.examples(ROWS, encoder(folders, kind))


def test_words_of_the_same_tokens(folders: dict[str, Path]) -> None:
    task = LabelWords("{text}", {"0": " not kind", "1": " not  kind"})
    with pytest.raises(ValueError, match="have the same tokens"):
        task.examples(ROWS, encoder(folders, "causal"))


def test_a_mask_in_the_data(folders: dict[str, Path]) -> None:
    task = LabelWords("{text} is {mask}", {"0": "cruel", "1": "kind"})
    with pytest.raises(RowError, match=r"row 2: has 2 mask tokens, \[MASK\], and needs the template's one"):
        task.examples([ROWS[0], {"text": "so [MASK]", "label": 0}], encoder(folders, "masked"))


def test_a_chat_template_that_refuses(folders: dict[str, Path]) -> None:
    ours = encoder(folders, "causal")
    ours.tokenizer.chat_template = "{{ raise_exception('no user query') }}"
    row = {"messages": [{"role": "tool", "content": "so"}, {"role": "assistant", "content": "kind"}]}
    with pytest.raises(RowError, match="row 1: the chat template of the tokenizer refuses it: no user query"):
        tasks.Chat().examples([row], ours)


def test_conversations_with_another_end_have_the_same_input() -> None:
    ends = [
        [{"role": "user", "content": "the"}, {"role": "assistant", "content": word}] for word in ("a", "b")
    ]
    first, second = (tasks.Chat().key({"messages": messages}) for messages in ends)
    assert first == second
