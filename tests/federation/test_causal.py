"""Promises of a job that tunes a language model, from its rows to its model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from chainfed_ray.client.pool import LocalPool
from chainfed_ray.data.examples import examples_of
from chainfed_ray.data.targets import learnable, packed, tokenize_texts
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.errors import InvalidJob
from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.evaluation.score import Score
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.saved_stack import save_stack
from chainfed_ray.planning.prepare import PlannedJob, prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import Round
from chainfed_ray.serving import peft_method  # noqa: F401  its import lets PEFT know the method
from chainfed_ray.spec.parse import parse_job
from tests.causal import byte_tokenizer, causal_folder
from tests.tokenizing import KINDS

# PEFT asks a model of transformers in a way that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
END = 2
TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORMS: dict[str, dict[str, str]] = {
    "text": {},
    "instructions": {"prompt": "question", "response": "answer"},
    "chats": {"messages": "chat"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = causal_folder("llama", tmp_path_factory.mktemp("causal") / "tiny")
    with_turns().save_pretrained(folder)
    return folder


def with_turns() -> PreTrainedTokenizerFast:
    """A tokenizer whose template closes each message."""
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = TURNS
    return tokenizer


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty rows that can be read in each form."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = []
    for place in range(60):
        question, answer = f"{place} and {place % 7}? ", "ab" * (1 + place % 4)
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = question + answer
        made.append({"text": text, "question": question, "answer": answer, "chat": chat, "label": str(place % 3)})
    path.write_text("\n".join(map(json.dumps, made)))
    return path


@pytest.fixture
def causal(llama: Path, rows: Path) -> dict[str, Any]:
    return {
        "name": "causal",
        "model": {"base": f"path:{llama}", "task": "causal-lm"},
        "data": {"train": f"path:{rows}", "max_length": 32},
        "fleet": {"clients": [{"name": "phone", "count": 3, "memory": "64MiB"}]},
        "chain": {"window": 1, "start": 0, "adapter": {"bottleneck": 8}},
        "rounds": {"total": 4, "clients": 2, "batch_size": 8, "learning_rate": 0.02, "warmup": 1},
        "seed": 3,
    }


def a_job(document: dict[str, Any], folder: Path) -> PlannedJob:
    return prepare_job(parse_job(document), folder / "scratch")


def trained(job: PlannedJob, folder: Path) -> tuple[Coordinator, list[Round]]:
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(folder / "log"))
    return coordinator, list(coordinator.rounds())


def targets_of(examples: Examples, index: int) -> list[int]:
    """The tokens that are to be predicted of an example."""
    assert examples.targets is not None
    place = slice(examples.offsets[index], examples.offsets[index + 1])
    found: list[int] = examples.ids[place][examples.targets[place]].tolist()
    return found


def test_of_a_response_every_token_is_learnt_and_of_its_prompt_none() -> None:
    examples = tokenize_texts(
        byte_tokenizer(chat=False), [("What?", " That"), ("A long question", " x")], max_length=12
    )
    whole = [*byte_tokenizer(chat=False)("What? That")["input_ids"], END]
    assert examples.ids[: len(whole)].tolist() == whole
    assert targets_of(examples, 0) == [*byte_tokenizer(chat=False)(" That")["input_ids"], END]
    assert targets_of(examples, 1) == [], "its response begins after twelve tokens"
    assert learnable(examples).tolist() == [0]


@settings(deadline=None)
@given(
    prompt=st.text(alphabet=st.sampled_from("anoyeswr:( )?\n🙂é")).filter(bool),
    response=st.text(alphabet=st.sampled_from("anoyeswr:( )?\n🙂é")).filter(str.strip),
    kind=st.sampled_from(list(KINDS)),
)
@example(prompt="Answer:(", response="yes)", kind="prepending")
def test_a_prompt_and_its_response_are_read_as_one_text(prompt: str, response: str, kind: str) -> None:
    """And a token is learnt if, and only if, the bytes up to and with it are more than the prompt's."""
    tokenizer = KINDS[kind]()
    prompt = f"Q{prompt}"  # a text's first space is lost on some
    examples = tokenize_texts(tokenizer, [(prompt, response)], max_length=1000)
    ids = examples.ids.tolist()
    assert tokenizer.decode(ids) == prompt + response + "</s>"
    spaced = not kind.startswith("byte-level")
    counts = [_bytes(token) if spaced else len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    read = np.cumsum(counts) - spaced
    assert examples.targets is not None
    assert examples.targets.tolist() == [False, *(read > len(prompt.encode()))[1:].tolist()]


def _bytes(token: str) -> int:
    return 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())


def test_a_row_without_a_response_has_nothing_to_learn() -> None:
    examples = tokenize_texts(byte_tokenizer(chat=False), [("What?", ""), ("What?", " "), (), ("What?", "a")], 100)
    assert examples.lengths.tolist() == [0, 0, 0, 7]
    assert learnable(examples).tolist() == [3]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), length=st.integers(2, 12))
def test_packing_loses_no_more_than_one_token_and_pads_nothing(lengths: list[int], length: int) -> None:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    texts = ragged(np.split(tokens, np.cumsum(lengths)[:-1]), np.zeros(len(lengths), dtype=np.int64))
    chunks = packed(texts, length)
    assert len(tokens) - len(chunks.ids) <= (len(tokens) > length)
    assert chunks.ids.tolist() == tokens[: len(chunks.ids)].tolist()
    assert set(chunks.lengths[:-1]) <= {length}
    assert len(targets_of(chunks, 0)) == chunks.lengths[0] - 1


LORA = {"adapter": {"kind": "lora", "rank": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "chain"),
    [
        *((form, {}) for form in FORMS),
        ("text", LORA | {"look_ahead": "exact"}),
        ("text", LORA | {"look_ahead": "exact", "direction": "down", "start": 1}),
        ("text", LORA | {"look_ahead": "none", "window": 2}),
    ],
    ids=str,
)
def test_the_saved_model_has_the_perplexity_that_the_job_tells(
    form: str, chain: dict[str, Any], causal: dict[str, Any], tmp_path: Path
) -> None:
    """Every form of rows, through the whole chain; judged by plain Hugging Face code, example by example."""
    causal["data"] |= FORMS[form]
    causal["chain"] |= chain
    job = a_job(causal, tmp_path)
    coordinator, rounds = trained(job, tmp_path)
    job_finished = coordinator.finish()
    whole = [record.evaluation for record in rounds if record.evaluation]
    assert [found.loss for found in whole] == sorted((found.loss for found in whole), reverse=True)  # type: ignore[type-var]
    save_stack(coordinator.models()["last"], tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(job.base.folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "model")).eval()
    loss, right, count = 0.0, 0, 0
    for index in range(len(job.test)):
        batch = job.test.batch(np.array([index]))
        with torch.no_grad():
            logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[0, :-1]
        assert batch.targets is not None
        wanted = batch.targets[0, 1:]
        following = batch.ids[0, 1:][wanted]
        loss += float(cross_entropy(logits[wanted], following, reduction="sum"))
        right += int((logits[wanted].argmax(-1) == following).sum())
        count += len(following)
    assert job_finished.loss == pytest.approx(loss / count, rel=1e-5)
    assert job_finished.accuracy == right / count
    assert job_finished.evaluation is not None
    assert job_finished.evaluation.perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(causal: dict[str, Any], tmp_path: Path) -> None:
    causal["evaluation"] = {"whole_every": "round"}
    _, expected = trained(a_job(causal, tmp_path / "whole"), tmp_path / "whole")
    log = tmp_path / "killed"
    for _ in expected:
        coordinator = Coordinator(job := a_job(causal, log), LocalPool(job.base), CommitLog(log / "log"))
        next(coordinator.rounds())
    found = CommitLog(log / "log").rounds()
    assert [_lasting(record) for record in found] == [_lasting(record) for record in expected]


def _lasting(record: Round) -> dict[str, Any]:
    """Of a round, what is no measurement of time or memory."""
    document = record.model_dump(
        exclude={
            "seconds": True,
            "turns": {"__all__": {"seconds", "cpu_seconds", "peak_bytes"}},
            "early_exit": {"seconds", "peak_bytes"},
        }
    )
    for key in ("seconds", "forward_seconds", "peak_bytes", "process_bytes"):
        document["evaluation"].pop(key)
    return document


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        (
            "data",
            {"messages": "question"},
            r"data\.messages is 'question'; expected a list .* row 1 of path:.* holds",
        ),
        ("data", {"messages": "label"}, r"data\.messages is 'label'; .* row 1 of path:.* holds"),
        ("data", {"prompt": "no", "response": "answer"}, r"data\.prompt is 'no'; expected a column of"),
        (
            "data",
            {"prompt": "text", "response": "answer", "max_length": 2},
            r"data\.max_length is 2; expected more tokens: of 48 train rows .* 0 keep",
        ),
        ("data", {"prompt": "text"}, r"data\.response is missing; expected the column that goes with data.prompt"),
        (
            "data",
            {"messages": "chat", "prompt": "a", "response": "b"},
            r"data\.prompt is 'a'; expected no value beside",
        ),
        ("data", {"messages": "chat", "text": "body"}, r"data\.text is 'body'; expected no value beside data.messages"),
        (
            "data",
            {"prompt": "question", "response": "answer", "text": "body"},
            r"data\.text is 'body'; expected no value beside data.prompt, which is 'question'",
        ),
        ("chain", {"head": "fitted"}, r"chain\.head is 'fitted'; expected 'model'"),
        ("evaluation", {"every": 0}, r"evaluation\.every is 0; expected 'round', 'stage'.* or a number of rounds"),
        ("model", {"task": "sequence-classification"}, r"chain\.head is 'model'; expected 'fitted' or 'zero'"),
    ],
)
def test_what_cannot_be_is_refused(
    section: str, changes: dict[str, Any], said: str, causal: dict[str, Any], tmp_path: Path
) -> None:
    causal["chain"]["head"] = "model"
    causal[section] = {**causal.get(section, {}), **changes}
    with pytest.raises(InvalidJob, match=said):
        a_job(causal, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_is_no_longer_than_the_model_has_positions(family: str, causal: dict[str, Any], tmp_path: Path) -> None:
    path, positions = causal_folder(family, tmp_path / family) / "config.json", 64
    if family == "llama":  # which has no table of them
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": positions}))
    causal["model"]["base"] = f"path:{tmp_path / family}"
    causal["data"]["max_length"] = positions
    a_job(causal, tmp_path)
    causal["data"]["max_length"] = positions + 1
    said = rf"data\.max_length is {positions + 1}; expected at most {positions}, the model's positions"
    with pytest.raises(InvalidJob, match=said):
        a_job(causal, tmp_path)


def test_chats_need_a_model_with_a_template(causal: dict[str, Any], tmp_path: Path) -> None:
    causal["model"]["base"] = f"path:{causal_folder('llama', tmp_path / 'silent')}"
    causal["data"]["messages"] = "chat"
    with pytest.raises(
        InvalidJob, match=r"model\.base is 'path:.*silent'; expected a model whose tokenizer has a chat"
    ):
        a_job(causal, tmp_path)


def test_a_slow_tokenizer_cannot_tell_a_prompt_from_its_response(
    causal: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False  # type: ignore[assignment]

    spec = parse_job(causal | {"data": causal["data"] | FORMS["instructions"]})
    with pytest.raises(InvalidJob, match=r"model\.base is .*; expected a model with a fast tokenizer"):
        examples_of(spec, Slow.from_pretrained(llama))
    assert examples_of(parse_job(causal), Slow.from_pretrained(llama)).pack_length == 32


HELD_OUT = [{"question": "Q", "answer": "A"}] * 3


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (
            {"train": [{"question": "Q", "answer": "A"}] * 10},
            r"data\.train is 'path:.*'; expected 10 train rows or more with something to learn, once others are held out; "
            "of 8, 8 have",
        ),
        (
            {"train": [{"question": "Q", "answer": ""}] * 20, "validation": HELD_OUT, "test": HELD_OUT},
            r"data\.train is 'path:.*'; expected 10 train rows or more with something to learn; of 20, 0 have",
        ),
        (
            {"train": [{"question": "Q", "answer": "A"}] * 20, "test": [{"question": "Q", "answer": None}]},
            r"data\.test is 'path:.*'; expected 1 test rows or more with something to learn; of 1, 0 have",
        ),
        (
            {"train": [{"question": "Q", "answer": "A"}] * 20, "test": [{"question": "Q" * 40, "answer": "A"}]},
            r"data\.max_length is 32; expected more tokens: of 1 test rows with something to learn, 0 keep",
        ),
    ],
    ids=["few", "no responses", "no response in a split", "cut"],
)
def test_too_little_to_learn_is_said_of_what_is_to_blame(
    splits: dict[str, list[dict[str, Any]]], said: str, causal: dict[str, Any], tmp_path: Path
) -> None:
    causal["data"] |= FORMS["instructions"]
    for name, made in splits.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
        causal["data"][name] = f"path:{tmp_path / name}.jsonl"
    with pytest.raises(InvalidJob, match=said):
        a_job(causal, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ["instructions", "chats"])
def test_rows_with_nothing_to_learn_are_left_out(
    form: str, suffix: str, causal: dict[str, Any], rows: Path, tmp_path: Path
) -> None:
    """And the others are what they are without them."""
    good = [json.loads(line) for line in rows.read_text().splitlines()]
    user, silent = {"role": "user", "content": "Q"}, {"role": "assistant", "content": " "}
    bad = [
        good[0] | {"answer": "", "chat": [user]},
        good[0] | {"answer": None, "chat": [user, silent]},
        good[0] | {"answer": " ", "chat": []},
    ]
    for name, made in (("good", good), ("mixed", [*good[:5], *bad, *good[5:]])):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            path.write_text("\n".join(map(json.dumps, made)))
        else:
            pd.DataFrame(made).to_parquet(path)
    causal["data"] |= FORMS[form] | {"validation": f"path:{rows}", "test": f"path:{rows}"}
    found = []
    for name in ("good", "mixed"):
        causal["data"]["train"] = f"path:{tmp_path / name}.{suffix}"
        found.append(examples_of(parse_job(causal), with_turns()))
    assert found[0].corpus == found[1].corpus
    assert found[0].train.ids.tolist() == found[1].train.ids.tolist()
    assert len(found[0].train) == len(good)


def test_of_running_text_a_row_of_one_token_counts(causal: dict[str, Any], tmp_path: Path) -> None:
    """Where no end is added to it, as the tokenizer has none."""
    endless = byte_tokenizer(chat=False)
    endless.eos_token = None
    (tmp_path / "letters.jsonl").write_text("\n".join(json.dumps({"text": letter}) for letter in "abcdefgh" * 10))
    causal["data"]["train"] = f"path:{tmp_path / 'letters.jsonl'}"
    examples = examples_of(parse_job(causal), endless)
    whole = examples.of_client(np.arange(64))
    assert len(whole.ids) == len(examples.train) == 64
    assert learnable(whole).tolist() == [0, 1]
    with pytest.raises(InvalidJob, match=r"data\.train is '[a-h]'; expected more text, or fewer clients"):
        examples.of_client(np.arange(1))


def test_an_encoder_is_no_language_model(causal: dict[str, Any], tiny_model_folder: Path, tmp_path: Path) -> None:
    causal["model"]["base"] = f"path:{tiny_model_folder}"
    with pytest.raises(InvalidJob, match=r"model\.base .*expected a language model \(it has no head of a language"):
        a_job(causal, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity", "column"])
def test_every_partition_deals_running_text(scheme: str, causal: dict[str, Any], tmp_path: Path) -> None:
    """Whole texts are dealt, and each client's own are then joined and cut."""
    causal["fleet"]["partition"] = {"scheme": scheme, **({"column": "label"} if scheme == "column" else {})}
    job = a_job(causal, tmp_path)
    assert sum(share.rows for share in job.manifest.clients) == 48
    assert all(client.examples.lengths[:-1].tolist() == [32] * (len(client.examples) - 1) for client in job.clients)
    assert bool(job.manifest.clients[0].rows_per_class) == (scheme == "dirichlet")


def test_the_score_is_by_token() -> None:
    judgement = Predictions(
        torch.tensor([2.0, 4.0]).double(), torch.tensor([1, 3]), torch.tensor([1, 1]), torch.tensor([-1, -1])
    )
    assert Score.of(judgement) == (1.5, 0.5)
