"""Every data format yields the same examples, and batches and losses are computed from them correctly."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.tiny_language_models import tiny
from support.tiny_models import labelled, tiny_bert, tiny_language_model
from zoext.cli import main
from zoext.cli._errors import UserError
from zoext.cli._problem import data, demo, problem
from zoext.cli._problem.evaluation import ratio
from zoext.cli._problem.holding_out import hold_out
from zoext.cli._problem.steps import batch_indices
from zoext.cli._settings import Settings
from zoext.tasks import Answers, Classes, Example, Row

TEXTS = ('She said: "fine, so be it"', "naïve — très bien", "two\tparts", "x = [1, 2]")
LABELS = (3, -1, 3, 10)


def texts_of(table: data.Table) -> tuple[str, ...]:
    return tuple(row["text"] for row in table.rows)


def labels_of(table: data.Table) -> tuple[data.Label, ...]:
    return tuple(row["label"] for row in data.with_labels(table).rows)


def table_of(texts: Sequence[str], labels: Sequence[data.Label]) -> data.Table:
    return data.Table(
        "here", tuple({"text": text, "label": label} for text, label in zip(texts, labels, strict=True))
    )


def held_out(table: data.Table, fraction: float, seed: int) -> tuple[data.Table, data.Table]:
    return hold_out(table, fraction, seed, texts_of(table), "label")


def write(path: Path, labels: tuple[int | str, ...] | None) -> Path:
    rows = [
        {"text": text} if labels is None else {"text": text, "label": labels[i], "id": i}
        for i, text in enumerate(TEXTS)
    ]
    match path.suffix:
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
        case ".txt":
            path.write_text("\ufeff" + "\r\n\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.mark.parametrize("labels", [None, LABELS, ("yes", "no", "yes", "7")])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tables(tmp_path: Path, suffix: str, labels: tuple[int | str, ...] | None) -> None:
    table, valid = data.read(str(write(tmp_path / f"some{suffix}", labels)))
    assert (texts_of(table), valid) == (TEXTS, None)
    if labels is None:
        assert "label" not in table.columns
    else:
        assert labels_of(table) == labels


def test_text_on_lines(tmp_path: Path) -> None:
    table, _ = data.read(str(write(tmp_path / "some.txt", None)))
    assert (texts_of(table), table.columns) == (TEXTS, ("text",))


def test_a_csv_text_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",1\nthree,0\n', encoding="utf-8")
    assert texts_of(data.read(str(tmp_path / "a.csv"))[0]) == ("one\ntwo", "three")


#: Line ends for str.splitlines, but not for any file format here.
NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("character", NO_LINE_ENDS)
def test_characters_that_end_no_line(tmp_path: Path, character: str, end: str) -> None:
    texts = (f"one{character}two", f"three{character}four")
    rows = {
        "a.csv": ["text,label", f"{texts[0]},0", f"{texts[1]},1"],
        "a.jsonl": [json.dumps({"text": text}, ensure_ascii=character < " ") for text in texts],
        "a.txt": list(texts),
    }
    for name, lines in rows.items():
        (tmp_path / name).write_bytes("".join(line + end for line in lines).encode())
        assert texts_of(data.read(str(tmp_path / name))[0]) == texts, name


def test_a_line_end_inside_a_csv_text_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"one\r\ntwo",1\r\n"a\nb",0\r\n')
    assert texts_of(data.read(str(tmp_path / "a.csv"))[0]) == ("one\r\ntwo", "a\nb")


@pytest.mark.parametrize("name", ["valid.csv", "validation.csv", "dev.csv"])
def test_folders(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl", LABELS)
    write(tmp_path / name, LABELS)
    train, valid = data.read(str(tmp_path))
    assert valid is not None
    assert labels_of(train) == labels_of(valid) == LABELS
    assert valid.source == str(tmp_path / name)


def test_a_part_held_out_is_of_other_texts() -> None:
    texts = tuple(f"text {i % 60}" for i in range(100))  # 40 texts occur twice
    table = table_of(texts, [i % 7 for i in range(100)])
    train, valid = held_out(table, 0.25, seed=1)
    both = [tuple(row.values()) for row in train.rows + valid.rows]
    assert Counter(both) == Counter(tuple(row.values()) for row in table.rows)
    assert len(set(texts_of(valid))) == 15
    assert not set(texts_of(train)) & set(texts_of(valid))
    assert held_out(table, 0.25, seed=1)[1] == valid
    assert held_out(table, 0.25, seed=2)[1] != valid


@pytest.mark.parametrize("seed", range(20))
def test_each_label_keeps_a_text_to_train_on(seed: int) -> None:
    # "rare" occurs once, "twin" in one text twice, "few" in three texts.
    rows = [("r", "rare"), ("t", "twin"), ("t", "twin"), ("a", "few"), ("b", "few"), ("c", "few")]
    rows += [(f"text {i}", "usual") for i in range(4)]
    table = table_of([text for text, _ in rows], [label for _, label in rows])
    train, valid = held_out(table, 0.5, seed)
    assert set(labels_of(train)) == {"rare", "twin", "few", "usual"}
    assert not set(labels_of(valid)) & {"rare", "twin"}
    assert len(set(texts_of(valid))) == 4  # of 9: round(0.5 * 9)


def test_labels_with_a_single_text_each_cannot_be_held_out() -> None:
    table = table_of(("a", "b", "b"), (0, 1, 1))
    with pytest.raises(UserError, match=r"here: no text can be held out.*give --valid-data"):
        held_out(table, 0.5, 0)


def test_labels_do_not_matter_to_a_language_model(tmp_path: Path) -> None:
    rows = [{"text": f"{word} so", "label": word} for word in ("bright", "kind", "sweet", "grim")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Settings(
        model=str(tiny_language_model(tmp_path / "model")),
        data=str(tmp_path / "a.jsonl"),
        task="causal-lm",
        validation_fraction=0.5,
    )
    loaded = problem.load(settings)
    assert (len(loaded.train), len(loaded.valid)) == (2, 2)


@pytest.mark.parametrize("labels", [("01", "1", "1", "0"), ("1", "+1", "0", "0"), (" 1", "1", "1_0", "1")])
def test_labels_that_are_no_plain_integers_stay_texts(tmp_path: Path, labels: tuple[str, ...]) -> None:
    assert labels_of(data.read(str(write(tmp_path / "a.csv", labels)))[0]) == labels


def test_a_label_that_is_a_number_and_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", (1, "1", 0, "no"))
    with pytest.raises(UserError, match="label 1 is a number in some rows and a text in others"):
        data.with_labels(data.read(str(path))[0])


def test_an_epoch_shows_each_example_once() -> None:
    size, batch = 37, 8
    seen = [index for step in range(37) for index in batch_indices(11, step, batch, size)]
    epochs = [seen[start : start + size] for start in range(0, len(seen), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == batch
    other_seed = [index for step in range(5) for index in batch_indices(12, step, batch, size)]
    assert seen[:size] != other_seed[:size]


def test_a_batch_larger_than_the_data() -> None:
    assert Counter(batch_indices(0, 3, 10, 4)).keys() == {0, 1, 2, 3}


def test_batches_depend_on_nothing_but_seed_and_step() -> None:
    backwards = [batch_indices(5, step, 6, 20) for step in reversed(range(12))]
    assert backwards[::-1] == [batch_indices(5, step, 6, 20) for step in range(12)]


class Fixed(torch.nn.Module):
    """Returns logits that depend only on the token and its position, in half precision."""

    def __init__(self, words: int, pooled: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = torch.randn(words, 16, words, generator=generator).to(torch.bfloat16)
        self.pooled = pooled

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        place = torch.arange(input_ids.shape[1])
        logits = self.table[input_ids, place] * attention_mask[..., None]
        return type("Output", (), {"logits": logits.sum(1) if self.pooled else logits})


def test_losses_of_next_tokens_ignore_padding() -> None:
    texts = ((5, 2, 0, 7), (1, 0), (3, 3, 3, 4, 0, 0, 6))  # 0 pads, and occurs in texts too
    objective, model = Answers(padding=0, kind="causal"), Fixed(8, pooled=False)
    examples = [Example((Row(tokens, tokens),)) for tokens in texts]
    scores = objective.scores(model, objective.collate(examples, torch.device("cpu")))
    assert scores.loss.dtype == torch.float32
    for i, tokens in enumerate(texts):
        log_probabilities = [
            model.table[token, place].float().log_softmax(0)[following].item()
            for place, (token, following) in enumerate(itertools.pairwise(tokens))
        ]
        assert scores.predictions[i] == len(tokens) - 1
        assert scores.loss[i].item() == pytest.approx(-sum(log_probabilities), rel=1e-5)
    assert scores.mean_loss().item() == pytest.approx(scores.loss.sum().item() / 10)


def test_losses_of_next_tokens_are_those_of_a_language_model() -> None:
    model, objective = tiny("Llama"), Answers(padding=0, kind="causal")
    rows: list[torch.Size] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape))
    texts = ((5, 2, 60, 7), (1, 9), (3, 3, 80, 4, 8, 8, 6))
    examples = [Example((Row(tokens, tokens),)) for tokens in texts]
    batch = objective.collate(examples, torch.device("cpu"))
    objective.prepare(model)
    rows.clear()
    with torch.no_grad():
        scores = objective.scores(model, batch)
        assert rows == [(3 + 1 + 6, 16)]  # padding has no logits
        torch.testing.assert_close(scores.mean_loss(), model(**batch).loss)
        alone = [objective.scores(model, objective.collate([each], torch.device("cpu"))) for each in examples]
    torch.testing.assert_close(scores.loss, torch.cat([each.loss for each in alone]))
    assert scores.predictions.tolist() == [3, 1, 6]


def test_losses_of_classes() -> None:
    examples = [Example((Row((1, 2)),), 2), Example((Row((3, 1, 5, 2, 4)),), 0), Example((Row((4,)),), 1)]
    objective, model = Classes(padding=0), Fixed(6, pooled=True)
    scores = objective.scores(model, objective.collate(examples, torch.device("cpu")))
    assert scores.loss.dtype == torch.float32
    for i, example in enumerate(examples):
        logits = sum(model.table[token, place] for place, token in enumerate(example.tokens)).float()
        assert scores.loss[i].item() == pytest.approx(-logits.log_softmax(0)[example.label].item(), rel=1e-2)
        assert scores.metrics["accuracy"][i] == (logits.argmax() == example.label)


def test_the_standard_error_of_a_mean() -> None:
    values = torch.tensor([0.5, 2.0, 1.0, -3.0, 0.25])
    estimated = ratio(values, torch.ones(5))
    assert estimated.value == pytest.approx(values.mean().item())
    assert estimated.error == pytest.approx(values.std().item() / math.sqrt(5))


def test_the_standard_error_of_a_mean_over_texts_of_different_length() -> None:
    # Of 400 intervals of two standard errors, 18 are expected to miss the true value, and more than 36 miss
    # it in one of 10,000 seeds (binomial). If tokens were treated as independent, about 300 would miss it.
    generator = torch.Generator().manual_seed(7)
    misses = 0
    for _ in range(400):
        counts = torch.randint(1, 30, (80,), generator=generator)
        quality = torch.randn(80, generator=generator)  # shared by all tokens of a text
        estimated = ratio(counts * (3.0 + quality), counts)
        misses += abs(estimated.value - 3.0) > 2 * estimated.error
    assert misses <= 36


def test_labels_become_the_classes_of_a_new_head(tmp_path: Path) -> None:
    rows = [{"text": "so kind", "label": label} for label in (10, 9, 2, 10)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Settings(model=str(tiny_bert(tmp_path / "model")), data=str(path), valid_data=str(path))
    loaded = problem.load(settings)
    assert [loaded.model.config.id2label[i] for i in range(3)] == ["2", "9", "10"]
    assert [example.label for example in loaded.train] == [2, 1, 0, 2]
    again = problem.load(settings)
    assert again.model.classifier.weight.equal(loaded.model.classifier.weight)


def test_a_model_that_knows_the_classes_keeps_its_head(tmp_path: Path) -> None:
    folder, path = tiny_bert(tmp_path / "model"), labelled(tmp_path / "a.jsonl")
    settings = Settings(model=str(folder), data=str(path), valid_data=str(path))
    loaded = problem.load(settings)
    assert loaded.model.classifier.weight.equal(load_file(folder / "model.safetensors")["classifier.weight"])
    assert not loaded.model.training


def test_texts_are_cut_to_what_the_model_has_positions_for(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model")
    (tmp_path / "a.csv").write_text("text,label\n" + "so " * 50 + ",0\nkind,1\n", encoding="utf-8")
    settings = Settings(
        model=str(folder), data=str(tmp_path / "a.csv"), valid_data=str(tmp_path / "a.csv"), max_length=300
    )
    assert [len(example.tokens) for example in problem.load(settings).train] == [16, 1]


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder, path = tiny_bert(tmp_path / "model"), labelled(tmp_path / "a.jsonl")
    before = torch.random.get_rng_state()
    problem.load(Settings(model=str(folder), data=str(path)))
    assert torch.random.get_rng_state().equal(before)


def test_held_out_words_of_the_demo_are_no_inflections_of_training_words() -> None:
    train, valid = demo.read_words(demo._folder(demo.DATA_PACKAGE) / "vader_lexicon.txt")
    assert len(train) > 4000
    assert len(valid) > 1000
    assert not {word[:4] for word in texts_of(train)} & {word[:4] for word in texts_of(valid)}
    assert not {"negative", "positive", "positively"} & {*texts_of(train), *texts_of(valid)}
    ratings = {row["text"]: row["label"] for row in train.rows + valid.rows}
    assert (ratings["abandon"], ratings["joyful"]) == ("negative", "positive")
    assert all(word.replace("-", "").replace("'", "").isalpha() for word in ratings)


def test_info_needs_no_extra() -> None:
    without = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'tqdm', 'safetensors', 'matplotlib')))"
    )
    program = f"{without}; from zoext.cli import main; sys.exit(main(['info']))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_info_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    names = ("compiler:", "instruction sets:", "in use:", "CUDA operators:", "threads:")
    for expected in (torch.__version__, *names):
        assert expected in said
