"""Promises of multiple choice: what is read of a test, and that the likeliest answer is the likeliest."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from chainfed_ray.data.choices import Choices, read_choices
from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import InvalidJob
from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.evaluation.streaming_evaluator import StreamingEvaluator
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import memory_profile_of
from chainfed_ray.model.saved_stack import save_stack
from chainfed_ray.model.source import ModelSource
from chainfed_ray.serving import peft_method  # noqa: F401  its import lets PEFT know the method
from tests.causal import a_causal_stack, byte_tokenizer, causal_folder
from tests.tokenizing import KINDS

# PEFT asks a model of transformers in a way that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.slow
def test_the_likeliest_choice_is_that_of_hugging_face(tmp_path: Path) -> None:
    llama = causal_folder("llama", tmp_path / "tiny")
    path = tmp_path / "choices.jsonl"
    made = [
        {
            "prompt": f"{place}, so ",
            "choices": ["abc", "b", f"{place}{place}"],
            "answer": (place % 3) if place % 2 else "b",
        }
        for place in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    tokenizer = byte_tokenizer(chat=False)
    choices = read_choices(f"path:{path}", tokenizer, max_length=32)
    saved = a_causal_stack(llama)
    save_stack(saved, tmp_path / "model")
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(tmp_path / "model")).eval()
    right, losses = 0, []
    for row in made:
        prompt = tokenizer(row["prompt"])["input_ids"]
        likelihoods = []
        for choice in row["choices"]:
            answer = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            likelihoods.append(-float(cross_entropy(logits, torch.tensor(answer), reduction="sum")))
        losses += [-value for value in likelihoods]
        answer = row["answer"] if isinstance(row["answer"], int) else row["choices"].index(row["answer"])
        right += max(range(3), key=likelihoods.__getitem__) == answer
    judgement = judged(llama, saved.stack, choices.examples, tmp_path)
    torch.testing.assert_close(judgement.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=0)
    assert choices.accuracy(judgement.losses) == right / len(made)


def judged(folder: Path, stack: AdapterStack, examples: Examples, scratch: Path) -> Predictions:
    """Every choice, by the streaming evaluator."""
    blocks = Blocks(folder, torch.float32)
    evaluator = StreamingEvaluator(
        ModelSource(folder, torch.float32, scratch), memory_profile_of(blocks, 8, None), {"choices": examples}
    )
    blocks.close()
    return evaluator.evaluate(stack, "choices").predictions


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_and_each_choice_are_read_as_one_text(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    choices = read([{"prompt": "Answer:(", "choices": ["yes)", " yes)", "no"], "answer": 0}], tokenizer, tmp_path)
    examples = choices.examples
    assert examples.targets is not None
    for place, choice in enumerate(("yes)", " yes)", "no")):
        span = slice(examples.offsets[place], examples.offsets[place + 1])
        ids, targets = examples.ids[span], examples.targets[span]
        assert tokenizer.decode(ids) == f"Answer:({choice}"
        assert tokenizer.decode(ids[~targets]) == "Answer:("


def test_a_long_question_loses_its_begin(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat=False)
    row = {"prompt": "A long question: ", "choices": ["yes", "a longer answer"], "answer": 0}
    examples = read([row], tokenizer, tmp_path, max_length=8).examples
    assert tokenizer.decode(examples.ids) == "ion: yes" + " a longe"
    assert examples.targets is not None
    assert tokenizer.decode(examples.ids[examples.targets]) == "yes" + "a longe"


def test_a_question_needs_a_token_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    joining = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(InvalidJob, match=r"evaluation\.choices .* that of row 1 is \"a\""):
        read([{"prompt": "a", "choices": ["b", "a"], "answer": 0}], joining, tmp_path)


@pytest.mark.parametrize(
    ("answer", "choices", "place"),
    [
        (1, ["x", "y"], 1),
        (1.0, ["x", "y"], 1),
        ("1", ["x", "y"], 1),
        ("1", ["1", "2"], 0),
        ("y", ["x", "y"], 1),
        ("B", ["x", "y"], 1),
        ("B", ["B", "A"], 0),
        ("Z", [str(place) for place in range(100, 126)], 25),
    ],
)
def test_an_answer_is_a_choice_its_place_or_its_letter(
    answer: Any, choices: list[str], place: int, tmp_path: Path
) -> None:
    row = {"prompt": "Q", "choices": choices, "answer": answer}
    assert read([row], byte_tokenizer(chat=False), tmp_path).answers == (place,)
    pd.DataFrame([row]).to_parquet(tmp_path / "choices.parquet")
    source = f"path:{tmp_path / 'choices.parquet'}"
    assert read_choices(source, byte_tokenizer(chat=False), max_length=32).answers == (place,)


def test_a_prompt_may_be_called_a_question(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat=False)
    row = {"question": "Q", "subject": "s", "choices": ["a", "b"], "answer": 1}
    assert tokenizer.decode(read([row], tokenizer, tmp_path).examples.ids) == "QaQb"
    assert tokenizer.decode(read([row | {"prompt": "P"}], tokenizer, tmp_path).examples.ids) == "PaPb"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["b"]}, r"a list of two texts or more as the choices of every row; that of row 2 is \[\"b\"\]"),
        ({"choices": "b, c"}, 'that of row 2 is "b, c"'),
        ({"answer": 2}, "one of the 2 choices, its place from 0, or its letter from A, as the answer .* row 2 is 2"),
        ({"answer": -1}, "that of row 2 is -1"),
        ({"answer": 0.5}, "that of row 2 is 0.5"),
        ({"answer": "d"}, 'that of row 2 is "d"'),
        ({"answer": "C"}, 'that of row 2 is "C"'),
        ({"answer": ""}, 'that of row 2 is ""'),
        ({"answer": "9" * 5000}, 'that of row 2 is "999'),
        ({"answer": [0]}, r"that of row 2 is \[0\]"),
        ({"answer": {"place": 0}}, 'that of row 2 is {"place": 0}'),
        ({"answer": True}, "that of row 2 is true"),
        ({"answer": None}, "that of row 2 is null"),
        ({"prompt": ""}, 'a text as the prompt of every row; that of row 2 is ""'),
    ],
)
def test_a_row_that_is_no_question_is_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"prompt": "a", "choices": ["b", "c"], "answer": 0}
    with pytest.raises(InvalidJob, match=rf"evaluation\.choices is 'path:.*'; expected .*{said}"):
        read([good, good | row], byte_tokenizer(chat=False), tmp_path)


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidJob, match=r"the columns prompt \(or question\), choices and answer; it has prompt, options"
    ):
        read([{"prompt": "a", "options": ["b", "c"], "answer": 0}], byte_tokenizer(chat=False), tmp_path)


def read(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int = 32) -> Choices:
    path = folder / "choices.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_choices(f"path:{path}", tokenizer, max_length)


def test_a_table_of_other_columns_is_refused_with_some_of_their_names(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"choices and answer; it has c0, c1, .*, c9 and 49990 more$"):
        read([{f"c{place}": 1 for place in range(50_000)}], byte_tokenizer(chat=False), tmp_path)
