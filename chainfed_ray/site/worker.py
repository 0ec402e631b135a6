"""The process at a site that reads its rows and takes turns on them, held to its budget. It talks to nobody but its parent.

It is asked by a line of JSON on its standard input, and answers by lines on its standard output: how far it is, and the answer.
What goes wrong is told to people at the site on standard error. The answer has no words of an error, since they may quote rows.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any, Literal

import numpy as np
import torch

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.client.messages import Client, Evaluating, Training, TurnOrder
from chainfed_ray.client.progress import progress
from chainfed_ray.client.survey import ClientSurvey, Survey
from chainfed_ray.client.turn import ready, take_turn
from chainfed_ray.data.examples import examples_of_site, rows_of_site, splits_of_site
from chainfed_ray.data.sources import Split
from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import BudgetExceeded, InvalidJob
from chainfed_ray.hub import digest_of, tokenizer
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.source import ModelSource, weights_folder
from chainfed_ray.planning.admission import Planner, requirements_of
from chainfed_ray.planning.base_model import check_texts
from chainfed_ray.planning.candidates import Candidate
from chainfed_ray.reading import OF_DISKS
from chainfed_ray.site.evaluation import evaluated_by
from chainfed_ray.site.folder import offered
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.wire.codec import client_of, memory_of, result_document, survey_document, turn_of, write_tensors
from chainfed_ray.wire.envelope import Answer, Done, HashedFile, JobDocument, NotDone, Order, phase_of

SplitName = Literal["train", "validation", "test"]
_HEARTBEAT_SECONDS = 1.0
_DISK_SECONDS = 5.0  # until a disk is asked again
_MOST_CLASSES, _LONGEST_NAME = 1000, 100  # of labels whose names are told
_log = logging.getLogger("chainfed")


class RowsOfJob:
    """One job at this site: its base model, and the examples of its clients, which are read once."""

    def __init__(self, order: Order, spec: dict[str, Any], folder: Path, scratch: Path, parts: int) -> None:
        self.spec: JobSpec = parse_job(spec)
        self._folder, self._parts = folder, parts
        base = weights_folder(self.spec.model.weights)
        self.same_base = digest_of(base) == order.base_digest
        self.source = ModelSource(base, getattr(torch, self.spec.model.dtype), scratch / order.job)
        self._tokenizer = tokenizer(self.spec.model.base, base)
        self._tokens = lru_cache(self._tokenized)
        self._rows = lru_cache(self._read)
        self._digest = lru_cache(lambda data: _digest_of(self._rows(data)))

    def survey(self, data: str) -> Survey:
        """The clients that are made of the file ``data``, each with the counts of its rows.

        Raises:
            InvalidJob: the model has no position for the longest text, or nothing of a client's rows can be learnt.
        """
        labels = sorted(set(self._rows(data).labels))
        found = Survey(tuple(self._survey(data, part, labels) for part in range(self._parts)))
        with closing(Blocks(self.source.folder, self.source.dtype)) as blocks:
            texts = (self._tokens(data, part, "train")[1] for part in range(self._parts))
            check_texts(self.spec.model, self.spec.data, blocks, texts)
        self._told(data).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._told(data).write_text(self._digest(data))
        return found

    def has_changed(self, data: str) -> bool:
        """True if the rows of the file ``data`` are others than when this site told of them."""
        told = self._told(data)
        return told.exists() and told.read_text() != self._digest(data)

    def has_classes(self, data: str) -> bool:
        """True if the labels of the file ``data`` look like classes: few names, short ones, and more rows than names.

        Otherwise a job that takes a column of texts for labels would have the texts told.
        """
        labels = self._rows(data).labels
        names = set(labels)
        return 2 * len(names) <= len(labels) and len(names) <= _MOST_CLASSES and max(map(len, names)) <= _LONGEST_NAME

    def names_rows_of(self, order: Order) -> bool:
        """True if the job's document names the rows of ``order``, for its class of clients."""
        asked = order.content if order.kind == "survey" else order.content["client"]
        known = {(group.name, group.data) for group in self.spec.fleet.clients if group.site}
        return (asked["client_class"], asked["data"]) in known

    def asks_for_this(self, order: Order) -> bool:
        """True if ``order`` is one that its job has, for a client that this site makes."""
        chain, evaluation = self.spec.chain, self.spec.evaluation
        client = order.content["client"]
        if client["parts"] != self._parts or not 0 <= client["part"] < self._parts:
            return False
        if order.kind == "profiling":
            return chain.start == "auto"
        if order.kind == "fitting":
            return chain.head == "fitted"
        if order.kind == "calibrating":
            return chain.head == "fitted" and evaluation.rows == "sites"
        if order.kind == "evaluating":
            return evaluation.rows == "sites" and order.content["turn"]["rows"] in ("validation", "test")
        private, asked = self.spec.privacy, client["privacy"]
        if private is None or asked is None:
            return private is None and asked is None
        return asked["clip"] == private.clip and (asked["noise"] is not None) == (private.where == "client")

    def is_planned(self, client: Client, turn: TurnOrder, memory: MemoryProfile) -> bool:
        """True if the plan that came with a turn of training is the one that this site makes for its own rows.

        The service plans from the counts that the site told. So a service that asks for more than these rows need is noticed.
        """
        assert isinstance(turn, Training), "the order is one of training"
        start = min(AdapterStack.from_tensors(turn.tensors).layers)
        planner = Planner(memory, requirements_of(self.spec.chain, self.spec.rounds, start))
        own = next(group for group in self.spec.fleet.clients if group.name == client.client_class)
        candidate = Candidate(client.name, own.name, client.examples, client.budget_bytes, own.disk, rank=own.rank)
        plans = planner.plan(candidate, turn.window), planner.fallback_plan(candidate, turn.window)
        return client.plan in plans

    def examples(self, data: str, part: int, classes: Sequence[str], split: SplitName) -> Examples:
        """The examples of a client: part ``part`` of the file ``data``, with the numbers of ``classes`` as labels."""
        labels, examples = self._tokens(data, part, split)
        number = {name: place for place, name in enumerate(classes)}
        return replace(examples, labels=np.array([number[label] for label in labels])) if labels else examples

    def _told(self, data: str) -> Path:
        """Where the digest of the rows is that this site told of. It stays at the site."""
        name = sha256(data.encode()).hexdigest()[:16]
        return self.source.scratch.parent.parent / "told" / f"{self.source.scratch.name}.{name}"

    def _survey(self, data: str, part: int, labels: Sequence[str]) -> ClientSurvey:
        examples = self.examples(data, part, labels, "train")
        if not len(examples):
            expected = f"more tokens: nothing is left to learn in the rows of client {part}"
            raise InvalidJob.at("data.max_length", self.spec.data.max_length, expected)
        found = np.bincount(examples.labels, minlength=len(labels)).tolist() if labels else []
        return ClientSurvey(
            examples.counts, {label: count for label, count in zip(labels, found, strict=True) if count}
        )

    def _tokenized(self, data: str, part: int, split: SplitName) -> tuple[tuple[str, ...], Examples]:
        """The labels of a client's rows, and the examples; these have no numbers of classes yet, which the job decides."""
        rows = self._rows(data)
        own = rows.take(np.arange(part, len(rows), self._parts))
        if not len(own):
            raise InvalidJob.at("fleet.clients.data", data, f"{self._parts} rows or more, one for each client")
        spec = self.spec
        chosen: Split = getattr(splits_of_site(spec.evaluation, spec.seed, own), split)
        return chosen.labels, examples_of_site(spec.model, spec.data, spec.evaluation, self._tokenizer, chosen)

    def _read(self, data: str) -> Split:
        return rows_of_site(self.spec.model, self.spec.data, f"path:{offered(self._folder, data)}")


class Worker:
    """Carries out orders, one at a time, on files in ``folder``. ``parts`` clients are made of each file.

    With ``tells_classes`` a survey has the names of the classes; otherwise a job must list them itself.
    """

    def __init__(self, folder: Path, scratch: Path, parts: int, tells_classes: bool) -> None:
        self._folder, self._scratch, self._parts, self._tells_classes = folder, scratch, parts, tells_classes
        self._job: tuple[str, RowsOfJob] | None = None
        self._warm: set[torch.dtype] = set()

    def carry_out(self, order: Order, document: JobDocument, tensors: Path | None, sent: Path) -> Answer:
        """Carry out ``order`` of the job with this ``document``. Its tensors are in the file ``tensors``.

        Tensors of the answer are written into ``sent``. A survey waits for a disk that does not answer, or the job would do
        without this site.
        """
        try:
            while True:
                try:
                    return self._answer(order, document, tensors, sent)
                except OSError as error:
                    if order.kind != "survey" or error.errno not in OF_DISKS:
                        raise
                    _log.warning("a survey waits for a disk: %s", error)
                    sleep(_DISK_SECONDS)
        except BudgetExceeded as error:
            _log.warning("%s", error)
            planned, cap, peak, phase = error.args
            return NotDone(reason="budget", phase=phase_of(phase), numbers=(planned, cap, *([peak] if peak else [])))
        except InvalidJob as error:
            _log.warning("%s", error)
            return NotDone.about("job", error.problems[0].field)
        except Exception as error:
            _log.exception("an order could not be carried out")
            return NotDone(reason="error", kind=type(error).__name__)

    def _answer(self, order: Order, document: JobDocument, tensors: Path | None, sent: Path) -> Answer:
        job = self._of(order, document)
        if not job.same_base:
            return NotDone(reason="model")
        if not job.names_rows_of(order):
            return NotDone(reason="plan")
        if order.kind == "survey":
            data = order.content["data"]
            survey = job.survey(data)
            tells = self._tells_classes and job.has_classes(data) if survey.clients[0].classes else True
            if job.spec.data.classes is None and not tells:
                return NotDone(reason="classes")
            return Done(content=survey_document(survey))
        if not job.asks_for_this(order):
            return NotDone(reason="plan")
        client, classes = client_of(order), document.classes
        assert client.remote is not None, "a client at this site"
        data, part = client.remote.data, client.remote.part
        if job.has_changed(data):
            return NotDone(reason="changed")
        if job.source.dtype not in self._warm:
            ready(job.source)
            self._warm.add(job.source.dtype)
        if order.kind in ("evaluating", "calibrating"):
            turn = turn_of(order, tensors)
            held_out = job.examples(data, part, classes, turn.rows if isinstance(turn, Evaluating) else "validation")
            evaluated = evaluated_by(client, job.source, memory_of(document), held_out, turn)
            return Done(content=result_document(evaluated)[0])
        examples = job.examples(data, part, classes, "train")
        own = replace(client, examples=examples, remote=None)
        if order.kind == "training" and not job.is_planned(own, turn_of(order, tensors), memory_of(document)):
            return NotDone(reason="plan")
        result = take_turn(own, job.source, lambda: turn_of(order, tensors), capped=True)
        content, sent_tensors = result_document(result)
        if not sent_tensors:
            return Done(content=content)
        write_tensors(sent_tensors, sent)
        return Done(content=content, tensors=HashedFile.of(sent))

    def _of(self, order: Order, document: JobDocument) -> RowsOfJob:
        known = self._job
        if known is None or known[0] != order.job:
            made = RowsOfJob(order, document.spec, self._folder, self._scratch, self._parts)
            known = self._job = (order.job, made)
        return known[1]


def _digest_of(rows: Split) -> str:
    """The digest of rows, by which this site knows them again. It is not sent: a few rows could be guessed from it."""
    digest = sha256()
    for row in zip(rows.texts, rows.labels or ("",) * len(rows), strict=True):
        digest.update(repr(row).encode())
    return digest.hexdigest()


def main() -> None:
    """Carry out orders until standard input ends. The arguments are those of ``Worker``, as JSON."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    given = json.loads(sys.argv[1])
    worker = Worker(Path(given["folder"]), Path(given["scratch"]), given["parts"], given["tells_classes"])
    for line in sys.stdin:
        asked = json.loads(line)
        tensors = Path(asked["tensors"]) if asked["tensors"] else None
        over = Event()
        beating = Thread(target=tell_progress, args=(over,), daemon=True)
        beating.start()
        document = JobDocument.read(Path(asked["document"]))
        answer = worker.carry_out(Order.model_validate(asked["order"]), document, tensors, Path(asked["sent"]))
        over.set()
        beating.join()
        _say({"answer": answer.model_dump(mode="json")})


def tell_progress(over: Event) -> None:
    """Say once a second how far the turn is, until it is ``over``. End this process if nobody hears it any more."""
    parent = os.getppid()
    while not over.wait(_HEARTBEAT_SECONDS):
        if os.getppid() != parent:  # it was killed, and nobody waits for the answer
            os._exit(1)
        now = progress()
        doing = {
            "doing": phase_of(now.doing.what),
            "done": now.doing.done,
            "total": now.doing.total,
            "unit": now.doing.unit,
        }
        try:
            _say({"heartbeat": {**doing, "worked": now.worked}})
        except OSError:  # whoever asked was killed, and another process of the site may begin the turn anew
            os._exit(1)


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
