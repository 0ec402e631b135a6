"""Promises of a job that tunes a language model, from its rows to its model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from chainfed_ray import peft_method  # noqa: F401  its import lets PEFT know the method
from chainfed_ray.adapter import AdapterStack
from chainfed_ray.blocks import Blocks
from chainfed_ray.choices import read_choices
from chainfed_ray.client import BaseModel
from chainfed_ray.commit_log import CommitLog
from chainfed_ray.config import JobSpec
from chainfed_ray.coordinator import Coordinator
from chainfed_ray.costs import costs_of
from chainfed_ray.errors import InvalidJob
from chainfed_ray.job import Job, prepare
from chainfed_ray.judgement import Judgement
from chainfed_ray.pool import LocalPool
from chainfed_ray.records import Round
from chainfed_ray.saved_stack import save_stack
from chainfed_ray.score import Score
from chainfed_ray.stream_evaluator import StreamEvaluator
from chainfed_ray.targets import learnable, packed, tokenize_texts
from chainfed_ray.tokens import Examples, ragged
from tests.causal import a_causal_stack, byte_tokenizer, causal_folder

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


def a_job(document: dict[str, Any], folder: Path) -> Job:
    return prepare(JobSpec.parse(document), folder / "scratch")


def trained(job: Job, folder: Path) -> tuple[Coordinator, list[Round]]:
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


def test_of_a_chat_what_assistants_say_is_learnt() -> None:
    chat = (("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "So"))
    tokenizer = with_turns()
    examples = tokenize_texts(tokenizer, [chat], max_length=100)
    assert tokenizer.decode(examples.ids) == "<user>Hi</s><assistant>Ho</s><user>And?</s><assistant>So</s>"
    assert tokenizer.decode(targets_of(examples, 0)) == "Ho</s>So</s>"
    with pytest.raises(InvalidJob, match="each message only adds to those before it; its template does more"):
        tokenize_texts(byte_tokenizer(chat=True), [chat], max_length=100)
    with pytest.raises(InvalidJob, match=r"data\.messages .* whose tokenizer has a chat template; this one has none"):
        tokenize_texts(byte_tokenizer(chat=False), [chat], max_length=100)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), length=st.integers(2, 12))
def test_packing_loses_no_more_than_one_token_and_pads_nothing(lengths: list[int], length: int) -> None:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    texts = ragged(np.split(tokens, np.cumsum(lengths)[:-1]), np.zeros(len(lengths), dtype=np.int64))
    chunks = packed(texts, length)
    assert len(tokens) - len(chunks.ids) <= (len(tokens) > length)
    assert chunks.ids.tolist() == tokens[: len(chunks.ids)].tolist()
    assert set(chunks.lengths[:-1]) <= {length}
    assert len(targets_of(chunks, 0)) == chunks.lengths[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_saved_model_has_the_perplexity_that_the_job_tells(
    form: str, causal: dict[str, Any], tmp_path: Path
) -> None:
    """Every form of rows, through the whole chain; judged by plain Hugging Face code, example by example."""
    causal["data"] |= FORMS[form]
    job = a_job(causal, tmp_path)
    coordinator, rounds = trained(job, tmp_path)
    ending = coordinator.finish()
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
    assert ending.loss == pytest.approx(loss / count, rel=1e-5)
    assert ending.accuracy == right / count
    assert ending.evaluation is not None
    assert ending.evaluation.perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)


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
        exclude={"seconds": True, "turns": {"__all__": {"seconds", "cpu_seconds", "peak_bytes"}}}
    )
    for key in ("seconds", "forward_seconds", "peak_bytes"):
        document["evaluation"].pop(key)
    return document


@pytest.mark.slow
def test_the_likeliest_choice_is_that_of_hugging_face(llama: Path, tmp_path: Path) -> None:
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


def judged(folder: Path, stack: AdapterStack, examples: Examples, scratch: Path) -> Judgement:
    """Every choice, by the streaming evaluator."""
    blocks = Blocks(folder, torch.float32)
    evaluator = StreamEvaluator(
        BaseModel(folder, torch.float32, scratch), costs_of(blocks, 8, None), {"choices": examples}
    )
    blocks.close()
    return evaluator.judge(stack, "choices").judgement


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "not so in row 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "not so in row 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "not so in row 1"),
        ({"prompt": "a", "choices": "b, c", "answer": 0}, "not so in row 1"),
        ({"prompt": "a", "options": ["b", "c"], "answer": 0}, "it has prompt, options, answer"),
    ],
)
def test_a_test_that_is_none_is_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InvalidJob, match=rf"evaluation\.choices .*{said}"):
        read_choices(f"path:{path}", byte_tokenizer(chat=False), max_length=32)


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        (
            "data",
            {"messages": "question"},
            r"data\.messages is 'question'; expected a list .* row 1 of path:.* has none",
        ),
        ("data", {"messages": "label"}, r"data\.messages is 'label'; .* row 1 of path:.* has none"),
        ("data", {"prompt": "no", "response": "answer"}, r"data\.prompt is 'no'; expected a column of"),
        ("data", {"prompt": "text", "response": "answer", "max_length": 2}, r"data\.max_length is 2; expected more"),
        ("data", {"prompt": "text"}, r"data\.response is missing; expected the column that goes with data.prompt"),
        (
            "data",
            {"messages": "chat", "prompt": "a", "response": "b"},
            r"data\.prompt is 'a'; expected no value beside",
        ),
        ("chain", {"head": "fitted"}, r"chain\.head is 'fitted'; expected 'model'"),
        ("evaluation", {"every": 0}, r"evaluation\.every is 0; expected 'round', 'stage' or a number of rounds"),
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


def test_an_encoder_is_no_language_model(causal: dict[str, Any], tiny_model_folder: Path, tmp_path: Path) -> None:
    causal["model"]["base"] = f"path:{tiny_model_folder}"
    with pytest.raises(InvalidJob, match=r"model\.base .*expected a language model \(it has no head of a language"):
        a_job(causal, tmp_path)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity", "column"])
def test_every_partition_deals_running_text(scheme: str, causal: dict[str, Any], tmp_path: Path) -> None:
    """Whole texts are dealt, and each client's own are then joined and cut."""
    causal["fleet"]["partition"] = {"scheme": scheme, **({"column": "label"} if scheme == "column" else {})}
    job = a_job(causal, tmp_path)
    assert sum(share.rows for share in job.manifest.clients) == 48
    assert all(client.examples.lengths[:-1].tolist() == [32] * (len(client.examples) - 1) for client in job.clients)
    assert bool(job.manifest.clients[0].rows_per_class) == (scheme == "dirichlet")


def test_the_score_is_by_token() -> None:
    judgement = Judgement(
        torch.tensor([2.0, 4.0]).double(), torch.tensor([1, 3]), torch.tensor([1, 1]), torch.tensor([-1, -1])
    )
    assert Score.of(judgement) == (1.5, 0.5)
