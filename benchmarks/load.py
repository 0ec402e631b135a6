"""``python -m benchmarks load``: a service under load: its throughput, its waiting times, and what a killed process costs.

It starts a service of its own, with MiniLM and SmolLM2 and stacks of random values: times do not depend on the values.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from statistics import quantiles
from threading import Event, Thread
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import torch

from benchmarks.cell_process import Row
from benchmarks.load_models import CLASSIFIERS, Prepared, prepared
from benchmarks.row_table import tell
from chainfed_ray.api.command.local_service import free_port, local_service
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.data.docstrings import rows
from chainfed_ray.hub import resolve
from chainfed_ray.model.blocks import weight_bytes
from chainfed_ray.model.saved_stack import stored_bytes
from chainfed_ray.serving.engine import Engine
from chainfed_ray.serving.messages import Question

_HOST, _PATIENCE = "127.0.0.1", 120.0
_CALLERS, _EACH = 32, 8  # callers at once, and requests of each
_ALONE, _LONG = 100, 256  # requests of one caller, and tokens of a long text
_ZIPF, _REQUESTS, _ROOM = 1.1, 600, 32  # exponent, requests, and stacks that there is room for
_STREAMS, _BESIDE = 15, 96  # texts, and tokens of each
_SEED = 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="chainfed-") as folder:
        made = prepared(Path(folder), _ROOM)
        with _service(made.settings) as (address, process):
            for measure in (_callers, _mixed, _first_token, _zipf, _commit, _killed):
                found += measure(made, address, process)
        found += _engine(made, next(row["seconds"] for row in found if row["what"].startswith("32 callers")))
    tell(found, options.json, width=120)


@contextmanager
def _service(settings: Settings) -> Iterator[tuple[str, psutil.Process]]:
    with local_service(settings, _HOST, free_port(_HOST)) as service:
        yield service.address, psutil.Process()


def _callers(made: Prepared, address: str, _: psutil.Process) -> Iterator[Row]:
    """Many callers at once, each with a stack of its own, against the same requests one after another."""
    asked, callers = _requests(made), [_Caller(address) for _ in range(_CALLERS)]
    for caller, pair in zip(callers, asked, strict=False):
        caller.classified(*pair)  # loads the stacks
    one, alone = _timed(lambda: [callers[0].classified(*pair) for pair in asked])
    with ThreadPoolExecutor(_CALLERS) as threads:
        each = lambda place: [callers[place].classified(*pair) for pair in asked[place::_CALLERS]]  # noqa: E731
        found, at_once = _timed(lambda: list(threads.map(each, range(_CALLERS))))
    together = [found[place % _CALLERS][place // _CALLERS] for place in range(len(asked))]
    difference = max(
        abs(a - b) for first, second in zip(one, together, strict=True) for a, b in zip(first, second, strict=True)
    )
    assert difference < 1e-5, f"the answers differ by {difference}"
    what = f"{_CALLERS} callers at once, {len(asked)} texts for {_CALLERS} stacks"
    yield {
        "what": what,
        "seconds": at_once,
        "said": f"{len(asked) / at_once:.0f} texts/s; {alone / at_once:.1f}× of one after another",
    }


def _engine(made: Prepared, at_once: float) -> Iterator[Row]:
    """The same texts in this process, without a service, as many at a time."""
    engine, asked = Engine(lambda model: made.settings.storage.model(str(model.job)), 2**31), _requests(made)
    questions = [Question(made.keys[model], [text]) for model, text in asked]
    engine.classify(questions[:_CALLERS])
    _, seconds = _timed(
        lambda: [engine.classify(questions[first : first + _CALLERS]) for first in range(0, len(questions), _CALLERS)]
    )
    yield {
        "what": "the same through the service, against the bare engine",
        "said": f"{seconds / at_once:.2f}×",
        "seconds": seconds,
    }


def _mixed(made: Prepared, address: str, _: psutil.Process) -> Iterator[Row]:
    """Classifications of one caller, alone and beside a long text."""
    texts = [text for text, _ in rows()[:_ALONE]]
    with httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False) as http:
        _written(http, made.writers[0], 1)  # loads the model
        alone = [_timed(lambda text=text: _classified(http, CLASSIFIERS[0], text))[1] for text in texts]  # type: ignore[misc]
        over, beside = Event(), list[float]()

        def write() -> None:
            with httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False) as other:
                _written(other, made.writers[0], _LONG)
            over.set()

        writing = Thread(target=write)
        writing.start()
        while not over.is_set():
            beside.append(_timed(lambda: _classified(http, CLASSIFIERS[0], texts[len(beside) % _ALONE]))[1])
        writing.join()
    ratio = _p99(beside) / _p99(alone)
    said = f"p99 {1000 * _p99(beside):.0f} ms of {len(beside)}, alone {1000 * _p99(alone):.0f} ms: {ratio:.1f}×"
    yield {"what": f"a classification beside a text of {_LONG} tokens", "said": said, "seconds": _p99(beside)}


def _first_token(made: Prepared, address: str, _: psutil.Process) -> Iterator[Row]:
    """The time to the first token, alone and while others are written."""
    with httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False) as http:
        alone = min(_to_first_token(http, made.writers[0]) for _ in range(3))
        with ThreadPoolExecutor(_STREAMS) as others:
            begun = [Event() for _ in range(_STREAMS)]
            for place, event in enumerate(begun):
                others.submit(_streamed, http, made.writers[place % len(made.writers)], event)
            assert all(event.wait(_PATIENCE) for event in begun)
            beside = [_to_first_token(http, made.writers[0]) for _ in range(3)]
    ratio = sorted(beside)[1] / alone
    said = f"{1000 * sorted(beside)[1]:.0f} ms, alone {1000 * alone:.0f} ms: {ratio:.1f}×"
    yield {"what": f"time to the first token beside {_STREAMS} texts", "said": said, "seconds": sorted(beside)[1]}


def _zipf(made: Prepared, address: str, _: psutil.Process) -> Iterator[Row]:
    """Many more stacks than there is room for, asked for as often as words are used."""
    weights = 1 / np.arange(1, len(CLASSIFIERS) + 1) ** _ZIPF
    chosen = np.random.default_rng(_SEED).choice(len(CLASSIFIERS), _REQUESTS, p=weights / weights.sum())
    text = rows()[0][0]
    with httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False) as http, ThreadPoolExecutor(4) as callers:
        waits = list(callers.map(lambda place: _timed(lambda: _classified(http, CLASSIFIERS[place], text))[1], chosen))
    hits = _hits(made, [CLASSIFIERS[place] for place in chosen], text)
    waited = f"p50 {1000 * quantiles(waits, n=100)[49]:.0f} ms, p99 {1000 * _p99(waits):.0f} ms"
    yield {
        "what": f"{len(CLASSIFIERS)} stacks, room for {_ROOM}, {_REQUESTS} requests",
        "said": f"no error; {waited}; {hits:.0%} of the stacks were there",
        "seconds": _p99(waits),
        "hits": hits,
    }


def _hits(made: Prepared, models: Sequence[str], text: str) -> float:
    """The share of requests whose stack was there, of the same requests one after another in a process with that room."""
    key = made.keys[models[0]]
    stack = stored_bytes(made.settings.storage.model(str(key.job)))
    room = weight_bytes(resolve(key.base), torch.float32) + _ROOM * stack
    engine = Engine(lambda model: made.settings.storage.model(str(model.job)), room)
    for model in models:
        engine.classify([Question(made.keys[model], [text])])
    return 1 - (engine.loads - 1) / len(models)  # one load is that of the base model


def _commit(made: Prepared, address: str, _: psutil.Process) -> Iterator[Row]:
    """From the commit of a round to the first answer of its stack."""
    name = made.training
    with httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False) as http:
        made.commit(0)
        _classified(http, f"{name}@latest", "warm up")
        waits = []
        for index in range(1, 6):
            began = monotonic()
            made.commit(index)
            assert http.get(f"/v1/models/{name}@latest").json()["round"] == index
            _classified(http, f"{name}@latest", "text")
            waits.append(monotonic() - began)
    yield {
        "what": "from the commit of a round to its first answer",
        "said": f"{max(waits):.2f} s at most",
        "seconds": max(waits),
    }


def _killed(made: Prepared, address: str, process: psutil.Process) -> Iterator[Row]:
    """The process of the models is killed while callers ask."""
    statuses, waits, over = list[int](), list[float](), Event()

    def ask(place: int) -> None:
        with httpx.Client(base_url=address, timeout=_PATIENCE, trust_env=False) as http:
            while not over.is_set():
                began = monotonic()
                body = {"model": CLASSIFIERS[place], "texts": ["salt"]}
                statuses.append(http.post("/v1/classify", json=body).status_code)
                waits.append(monotonic() - began)

    with ThreadPoolExecutor(4) as callers:
        asking = [callers.submit(ask, place) for place in range(4)]
        over.wait(2)
        for replica in [one for one in process.children(recursive=True) if "Inference" in " ".join(one.cmdline())]:
            replica.kill()
        over.wait(40)
        over.set()
        for future in asking:
            future.result()
    failed = sum(status != 200 for status in statuses)
    said = f"{failed} of {len(statuses)} requests failed; the longest wait {max(waits):.1f} s"
    yield {"what": "the process of the models is killed, four callers ask", "said": said, "seconds": max(waits)}


class _Caller:
    """A caller with a connection of its own, which takes a quarter of the processor's time that ``httpx`` takes.

    Callers share the processor with the service that is measured.
    """

    def __init__(self, address: str) -> None:
        at = urlsplit(address)
        self._connection = HTTPConnection(str(at.hostname), at.port, timeout=_PATIENCE)

    def classified(self, model: str, text: str) -> list[float]:
        """The probability of each class, in the order of their names."""
        body = json.dumps({"model": model, "texts": [text]})
        self._connection.request("POST", "/v1/classify", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        document = json.loads(answer.read())
        assert answer.status == 200, document
        return _scores(document)


def _requests(made: Prepared) -> list[tuple[str, str]]:
    texts = [text for text, _ in rows()[: _CALLERS * _EACH]]
    return [(CLASSIFIERS[place % _CALLERS], text) for place, text in enumerate(texts)]


def _classified(http: httpx.Client, model: str, text: str) -> list[float]:
    answer = http.post("/v1/classify", json={"model": model, "texts": [text]})
    answer.raise_for_status()
    return _scores(answer.json())


def _scores(document: dict[str, Any]) -> list[float]:
    scores: dict[str, float] = document["results"][0]["scores"]
    return [scores[name] for name in sorted(scores)]


def _written(http: httpx.Client, model: str, tokens: int) -> None:
    body = {"model": model, "prompt": "The tide", "max_tokens": tokens, "temperature": 1.0, "seed": 1}
    http.post("/v1/completions", json=body).raise_for_status()


def _streamed(http: httpx.Client, model: str, begun: Event) -> None:
    """Read a text piece by piece; ``begun`` is set with the first one."""
    body = {"model": model, "prompt": "The tide", "max_tokens": _BESIDE, "seed": 1, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for _ in answer.iter_lines():
            begun.set()


def _to_first_token(http: httpx.Client, model: str) -> float:
    body = {"model": model, "prompt": "The tide", "max_tokens": 4, "temperature": 0, "stream": True}
    began = monotonic()
    with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        next(islice((line for line in answer.iter_lines() if line.startswith("data: {")), 1))
        return monotonic() - began


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = monotonic()
    result = work()
    return result, monotonic() - began


def _p99(waits: Sequence[float]) -> float:
    return quantiles(waits, n=100)[98]
