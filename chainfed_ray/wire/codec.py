"""Orders and results as the documents that cross the boundary (the wire), and back.

Every number is checked for its type. What a result says is checked further where each client's is (``federation/collect.py``).
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from re import fullmatch, search
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.cache_folder import writing
from chainfed_ray.chain import Window
from chainfed_ray.client.first_pass import StartGuess
from chainfed_ray.client.head_sums import sums_bytes
from chainfed_ray.client.messages import (
    Calibrating,
    Client,
    Evaluating,
    Fitting,
    HeadLosses,
    HeadSums,
    Metrics,
    Profile,
    Profiling,
    Training,
    TurnOrder,
    TurnResult,
    Update,
)
from chainfed_ray.client.privacy import ClientPrivacy, Noise
from chainfed_ray.client.survey import ClientSurvey, SiteRows, Survey
from chainfed_ray.data.tokens import NO_EXAMPLES, ExampleCounts
from chainfed_ray.errors import InvalidUpdate
from chainfed_ray.wire.envelope import PROTOCOL, HashedFile, JobDocument, Kind, Order

_PLAN = TypeAdapter(TurnPlan)
_WINDOW = TypeAdapter(Window)
_MEMORY = TypeAdapter(MemoryProfile)
_GUESS = TypeAdapter(StartGuess)
_NAME = "[a-z0-9-]{1,100}"
_CONTROLS = "[\x00-\x1f\x7f-\x9f]"  # a terminal that shows a record would obey them
_HEADER_BYTES = 2**20  # of a file of tensors
_MOST_CLIENTS, _MOST_CLASSES, _MOST_EXAMPLES = 1000, 1000, 10**8  # of a site; examples of a client


class _ClientDocument(TypedDict):
    examples: int
    longest: int
    tokens: int
    classes: dict[str, int]


class _SurveyDocument(TypedDict):
    clients: list[_ClientDocument]


class _Spent(TypedDict):
    examples: int
    cpu_seconds: float
    peak_bytes: int | None


class _ProfileDocument(_Spent):
    cka: list[float]


class _UpdateDocument(_Spent):
    loss: float
    steps: int
    seconds: float


class _MetricsDocument(_Spent):
    predictions: int
    loss: float
    correct: int
    hits: list[int]
    occurs: list[int]


class _HeadLossesDocument(_Spent):
    losses: list[list[float]]
    correct: list[int]


_CONTENTS: Mapping[str, TypeAdapter[Any]] = {
    "profiling": TypeAdapter(_ProfileDocument),
    "training": TypeAdapter(_UpdateDocument),
    "fitting": TypeAdapter(_Spent),
    "evaluating": TypeAdapter(_MetricsDocument),
    "calibrating": TypeAdapter(_HeadLossesDocument),
}
_SURVEY = TypeAdapter(_SurveyDocument)
_ORDERS: Mapping[str, type] = {
    "training": Training,
    "fitting": Fitting,
    "evaluating": Evaluating,
    "calibrating": Calibrating,
}
_RESULTS: Mapping[str, type] = {
    "profiling": Profile,
    "training": Update,
    "fitting": HeadSums,
    "evaluating": Metrics,
    "calibrating": HeadLosses,
}


def job_document(
    spec: Mapping[str, Any], memory: MemoryProfile | None = None, classes: Sequence[str] = ()
) -> JobDocument:
    """The document of a job, which all its orders name. With the ``memory`` of the model's parts a site plans its turns."""
    return JobDocument(
        spec=dict(spec), memory=None if memory is None else _MEMORY.dump_python(memory), classes=tuple(classes)
    )


def survey_order(job: str, name: str, document: HashedFile, base_digest: str, client_class: str, data: str) -> Order:
    """The order to survey the file ``data`` for the clients of ``client_class``."""
    content = {"client_class": client_class, "data": data}
    return _order(job, name, "survey", document, base_digest, content, None, 0)


def turn_order(
    job: str,
    name: str,
    document: HashedFile,
    base_digest: str,
    client: Client,
    order: TurnOrder,
    tensors: HashedFile | None,
) -> Order:
    """The order that ``client`` is given. Its tensors are in a file that ``tensors`` describes.

    Raises:
        ValueError: the order has an objective of the caller's own, which is code.
    """
    assert client.remote is not None, "a client at a site"
    match order:
        case Profiling():
            kind: Kind = "profiling"
            guess = None if order.guess is None else _GUESS.dump_python(order.guess)
            turn: dict[str, Any] = {"examples": order.examples, "seed": order.seed, "guess": guess}
            most = 0
        case Training():
            if order.objective is not None:
                raise ValueError("an objective of one's own is code, which no site is sent")
            kind = "training"
            kept = {
                name: value for name, value in vars(order).items() if name not in ("tensors", "window", "objective")
            }
            turn = {**kept, "window": _WINDOW.dump_python(order.window)}
            most = sum(tensor.nbytes for tensor in order.tensors.values()) + _HEADER_BYTES
        case Fitting():
            kind = "fitting"
            turn = {"window": _WINDOW.dump_python(order.window), "exit": order.exit}
            most = sums_bytes(order) + _HEADER_BYTES
        case Evaluating():
            kind = "evaluating"
            turn = {"window": _WINDOW.dump_python(order.window), "rows": order.rows}
            most = 0
        case Calibrating():
            kind = "calibrating"
            turn = {"window": _WINDOW.dump_python(order.window)}
            most = 0
    noise = client.privacy and client.privacy.noise
    privacy = client.privacy and {
        "clip": client.privacy.clip,
        "noise": noise and {"deviation": noise.deviation, "key": noise.key.hex()},
    }
    content = {
        "client": {
            "name": client.name,
            "client_class": client.client_class,
            "budget_bytes": client.budget_bytes,
            "cap_bytes": client.cap_bytes,
            "plan": _PLAN.dump_python(client.plan),
            "privacy": privacy,
            "data": client.remote.data,
            "part": client.remote.part,
            "parts": client.remote.parts,
        },
        "turn": turn,
    }
    return _order(job, name, kind, document, base_digest, content, tensors, most)


def client_of(order: Order) -> Client:
    """The client of a turn, as it is known at the site: without its examples, which the site has.

    Raises:
        ValueError: the order is not what a service of this version sends.
    """
    given = dict(order.content["client"])
    for key in ("name", "client_class"):
        if not fullmatch(_NAME, given[key]):  # a client's caches are in a folder with its name
            raise ValueError(f"the client's {key} is {given[key]!r}")
    privacy = given["privacy"]
    if privacy:
        noise = privacy["noise"]
        privacy = ClientPrivacy(privacy["clip"], noise and Noise(noise["deviation"], bytes.fromhex(noise["key"])))
    rows = SiteRows("", given["data"], given["part"], given["parts"], ExampleCounts(0, 0, 0))
    return Client(
        given["name"],
        given["client_class"],
        NO_EXAMPLES,
        given["budget_bytes"],
        _PLAN.validate_python(given["plan"]),
        given["cap_bytes"],
        privacy,
        remote=rows,
    )


def memory_of(document: JobDocument) -> MemoryProfile:
    """The memory of the base model's parts.

    Raises:
        ValueError: the document is not what a service of this version sends with a turn.
    """
    return _MEMORY.validate_python(document.memory)


def turn_of(order: Order, tensors: Path | None) -> TurnOrder:
    """The turn that a site is asked to take. Its tensors are read from the file ``tensors``.

    Raises:
        ValueError: the order is not what a service of this version sends.
    """
    turn = dict(order.content["turn"])
    if order.kind == "profiling":
        guess = None if turn["guess"] is None else _GUESS.validate_python(turn["guess"])
        return Profiling(turn["examples"], turn["seed"], guess)
    if tensors is None:
        raise ValueError("the order has no tensors")
    turn["window"] = _WINDOW.validate_python(turn["window"])
    made: TurnOrder = _ORDERS[order.kind](tensors=load_file(tensors), **turn)
    return made


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write ``tensors`` into ``file``.

    Raises:
        OSError: the disk is full, or does not work.
    """
    with writing():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def result_document(result: TurnResult) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The result of a turn: what goes into the answer's JSON, and its tensors."""
    fields = dict(vars(result))
    tensors = fields.pop("tensors", {})
    return fields, tensors


def result_of(client: str, kind: Kind, content: Mapping[str, Any], tensors: Path | None) -> TurnResult:
    """The result that a site sent.

    Raises:
        InvalidUpdate: the answer is no such result.
    """
    try:
        fields = dict(_CONTENTS[kind].validate_python(dict(content), strict=True))
        if kind in ("training", "fitting"):
            fields["tensors"] = load_file(tensors) if tensors else {}
        made: TurnResult = _RESULTS[kind](**{name: _frozen(value) for name, value in fields.items()})
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise InvalidUpdate(client, f"it cannot be read ({type(error).__name__})") from None
    return made


def _frozen(value: Any) -> Any:
    """Lists as tuples, which a result has."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def survey_document(survey: Survey) -> dict[str, Any]:
    """A survey as JSON."""
    clients = [{**vars(client.counts), "classes": dict(client.classes)} for client in survey.clients]
    return {"clients": clients}


def survey_of(content: Mapping[str, Any], max_length: int) -> Survey:
    """The survey that a site sent, for a job whose texts are cut at ``max_length`` tokens.

    Raises:
        ValueError: the answer is no survey that an honest site sends.
    """
    found = _SURVEY.validate_python(content)["clients"]
    if not 1 <= len(found) <= _MOST_CLIENTS:
        raise ValueError(f"it has {len(found)} clients; expected 1 to {_MOST_CLIENTS}")
    clients = []
    for one in found:
        counts, classes = ExampleCounts(one["examples"], one["longest"], one["tokens"]), one["classes"]
        _check_counts(counts, classes, max_length)
        clients.append(ClientSurvey(counts, classes))
    return Survey(tuple(clients))


def _check_counts(counts: ExampleCounts, classes: Mapping[str, int], max_length: int) -> None:
    """Refuse counts that contradict each other, or that nobody has. Whether they are true, a site alone knows."""
    if not 1 <= counts.examples <= _MOST_EXAMPLES or not 1 <= counts.longest <= min(max_length, counts.tokens):
        raise ValueError(
            f"it counts {counts.examples} examples of {counts.tokens} tokens, {counts.longest} in the longest"
        )
    if counts.tokens > counts.examples * counts.longest:
        raise ValueError(f"{counts.examples} examples of at most {counts.longest} tokens do not have {counts.tokens}")
    if len(classes) > _MOST_CLASSES or any(len(name) > 1000 or search(_CONTROLS, name) for name in classes):
        raise ValueError("it has too many classes, or a name that is too long or has control characters")
    if any(count < 0 for count in classes.values()) or sum(classes.values()) not in (0, counts.examples):
        raise ValueError(f"its classes have {sum(classes.values())} examples in all, not {counts.examples}")


def _order(
    job: str,
    name: str,
    kind: Kind,
    document: HashedFile,
    base_digest: str,
    content: dict[str, Any],
    tensors: HashedFile | None,
    most_bytes: int,
) -> Order:
    known = [PROTOCOL, job, kind, document.sha256, base_digest, content, tensors.sha256 if tensors else None]
    digest = sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    return Order(
        id=digest,
        job=job,
        name=name,
        kind=kind,
        document=document,
        base_digest=base_digest,
        content=content,
        tensors=tensors,
        most_bytes=most_bytes,
    )
