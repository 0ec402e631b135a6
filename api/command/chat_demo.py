"""``chainfed demo --chat``: a real language model before and after a federated job, asked the same questions."""

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chainfed_ray.activity import Reporter
from chainfed_ray.api.command.demo import Records, explained, headed
from chainfed_ray.api.report.activity_display import ActivityDisplay
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.data.docstrings import rows
from chainfed_ray.federation.evaluation import streamed
from chainfed_ray.planning.prepare import prepare_job
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.units import perplexity

_QUESTION = "Which Python library is this from?\n"
_SPLITS = {"train": 640, "validation": 48, "test": 64}  # rows
_ASKED, _SHOWN = 32, 4  # test rows that are asked of both models, and that are shown
_AT_ONCE = 16
_WORDS = 12  # the most tokens of an answer
_STORY = """ SmolLM2 is a language model of 135 million weights: 513 MiB. Eight clients with 96 to 256 MiB hold \
questions and answers: “Which Python library is this from?”, and a sentence of its documentation. They train adapters in the \
four highest layers.
"""


def chat_demo(spec: JobSpec, job_file: Path, out: Path, console: Console) -> dict[str, Any]:
    """Start the service, train the job, and ask its model and the untuned one. See ``demo``."""
    return explained(_STORY, _with_rows(spec, out / "rows"), job_file, out, console, _tell)


def _with_rows(spec: JobSpec, folder: Path) -> JobSpec:
    """Write the rows, as chats, and let the job read them."""
    folder.mkdir(parents=True, exist_ok=True)
    document, chosen = spec.document(), iter(rows())
    for split, count in _SPLITS.items():
        path = (folder / f"{split}.jsonl").absolute()
        with path.open("w", encoding="utf-8") as file:
            for _, (sentence, library) in zip(range(count), chosen, strict=False):
                answer = {"role": "assistant", "content": library}
                file.write(json.dumps({"messages": [*_chat(sentence), answer]}) + "\n")
        document["data"][split] = f"path:{path}"
    return parse_job(document)


def _tell(client: Client, spec: JobSpec, job: str, records: Records, out: Path, console: Console) -> dict[str, Any]:
    with ActivityDisplay(console) as listen:
        Reporter("evaluating the untuned model, to compare", listen).begin()
        before = _untuned_loss(spec)
        tuned = client.json(calls.get_job(job))["model"]
        base = tuned.partition(":")[0]
        first = sum(_SPLITS[split] for split in ("train", "validation"))
        asked = rows()[first : first + _ASKED]
        Reporter("asking both models", listen).begin()
        answers = {model: _answers(client, model, [sentence for sentence, _ in asked]) for model in (base, tuned)}
    console.print(headed("5.", f" POST /v1/chat/completions: the same {_ASKED} questions for {base} and for {tuned}."))
    after = records[-1].loss
    assert after is not None
    exact = {
        model: sum(answer == library for answer, (_, library) in zip(said, asked, strict=True))
        for model, said in answers.items()
    }
    table = Table("", base, tuned, box=None, header_style="bold")
    table.add_row("perplexity of the test rows' answers", f"{perplexity(before):.2f}", f"{perplexity(after):.2f}")
    table.add_row("exact answers", *(f"{count} of {_ASKED}" for count in exact.values()))
    console.print(table)
    for place, (sentence, library) in enumerate(asked[:_SHOWN]):
        console.print(f"   “{sentence}” ({library})")
        for model, said in answers.items():
            console.print(f"      {model}: {said[place]}")
    return {
        **client.json(calls.get_job(job))["result"],
        "id": job,
        "model": tuned,
        "perplexity": {base: perplexity(before), tuned: perplexity(after)},
        "exact_answers": {model: count / _ASKED for model, count in exact.items()},
    }


def _untuned_loss(spec: JobSpec) -> float:
    """The loss of the base model alone on the test rows."""
    with tempfile.TemporaryDirectory(prefix="chainfed-") as scratch:
        job = prepare_job(spec, Path(scratch))
        with closing(streamed(job)) as evaluation:
            loss = evaluation.untuned().loss
    assert loss is not None
    return loss


def _answers(client: Client, model: str, sentences: Sequence[str]) -> list[str]:
    """What ``model`` answers, the likeliest word by word. Requests are sent together, and answered together."""

    def ask(sentence: str) -> str:
        answer = client.json(calls.chat_completions(model, _chat(sentence), max_tokens=_WORDS, temperature=0))
        text: str = answer["choices"][0]["message"]["content"]
        return text

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, sentences))


def _chat(sentence: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": _QUESTION + sentence}]
