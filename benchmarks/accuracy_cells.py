"""The cells of the accuracy benchmark: lists them, says which others each one needs, and describes the run that fills it.

A cell is one combination of data set, partition, method, seed and protocol.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from benchmarks.accuracy_protocols import reached, rounds_for, rounds_for_steps
from benchmarks.accuracy_rows import Key, Names, Row, Rows
from benchmarks.corpora import Corpus
from benchmarks.methods import END_TO_END, UNTRAINED, Document, Kind, Method, merged
from chainfed_ray.spec.parse import parse_job

_CLIENTS, _LOCAL_STEPS = 10, 3  # clients of a round, and optimizer steps of a client's turn
PHONE, SILO = {"name": "phone", "count": 14, "memory": "64MiB"}, {"name": "silo", "count": 6, "memory": "1GiB"}
_UNLIMITED = "1TiB"  # more memory than any turn takes

# The keys of a job that a row has under other names, and the deadline, on which no result depends: here no client is slow. The
# rest of a job with its defaults belongs to the row's options.
_NAMED: Any = {
    "name": True,
    "model": True,
    "data": True,
    "fleet": True,
    "seed": True,
    "rounds": {"total": True, "deadline": True},
}

Rates = tuple[float, float]


class Cell(NamedTuple):
    """A method on a data set, partitioned by ``alpha`` (None for IID) and ``seed``; ``protocol`` says how long it trains.

    A cell with ``rates`` (adapters, head) tunes those learning rates, and is never evaluated on the test split.
    """

    dataset: str
    alpha: float | None
    method: str
    seed: int
    protocol: str
    rates: Rates | None = None


@dataclass(frozen=True)
class Run:
    """One run, as it is handed to a process: the job's ``document`` with its number of rounds.

    ``able`` is the only class of clients that takes part, or None for all classes. The model is evaluated on the test split
    only if the run is ``tested``. The memory of training the whole model is measured only if it is ``weighed``.
    """

    kind: Kind
    document: Document
    able: str | None
    tested: bool
    weighed: bool


@dataclass(frozen=True)
class Study:
    """The cells that the command line asks for.

    ``client_steps`` are the optimizer steps of all clients in end-to-end training, None for each data set's own number.
    ``target`` is a validation accuracy, None for what end-to-end training of the same seed reaches. A stage is evaluated at its
    start and end, and after every ``evaluate_every`` rounds if that is given; it ends with the best of the evaluated stacks.
    """

    corpora: dict[str, Corpus]
    methods: dict[str, Method]
    base: str
    alphas: tuple[float | None, ...]
    chosen: tuple[str, ...]
    protocols: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[Rates, ...] = ()
    client_steps: int | None = None
    target: float | None = None
    evaluate_every: int | None = None

    def cells(self) -> list[Cell]:
        """The cells that were asked for, in the order of their seeds."""
        protocols = ("steps",) if self.rates else self.protocols
        return [
            Cell(dataset, alpha, method, seed, protocol, rates)
            for seed in self.seeds
            for dataset in self.corpora
            for alpha in self.alphas
            for protocol in protocols
            for method in self.chosen
            for rates in self._rates(method)
        ]

    def _rates(self, method: str) -> tuple[Rates | None, ...]:
        if not self.rates:
            return (None,)
        return () if self.methods[method].kind in UNTRAINED else self.rates

    def needs(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells whose rows must exist before ``cell`` can be run."""
        reference, own = _reference_and_own(cell)
        match cell.protocol:
            case "steps":
                return ()
            case "target":
                compute = cell._replace(protocol="compute")
                return (compute,) if self.target is not None else (reference, compute)
            case _:
                return tuple(dict.fromkeys((reference, own)))

    def with_needs(self) -> list[Cell]:
        """The cells that were asked for, and those that they need, each after the cells that it needs."""
        found: dict[Cell, None] = {}

        def add(cell: Cell) -> None:
            for need in self.needs(cell):
                add(need)
            found[cell] = None

        for cell in self.cells():
            add(cell)
        return list(found)

    def key(self, cell: Cell) -> Key:
        """The key under which the row of a cell is kept."""
        method = self.methods[cell.method]
        options: dict[str, Any] = {
            "kind": method.kind,
            "part": method.part,
            "client_steps": self._client_steps(cell),
            "tested": cell.rates is None,
            "job": self._document(cell),
        }
        if method.follows_defaults:
            options["defaults"] = parse_job(self._complete(cell, 1)).model_dump(mode="json", exclude=_NAMED)
        if cell.protocol == "target":
            options["target"] = self.target
        return Key(Names(*cell[:5]), options)

    def next(self, cell: Cell, rows: Rows) -> Row | Run:
        """The row of a cell, if it follows from other rows; otherwise the run that gives it.

        Raises:
            KeyError: a row that the cell needs does not exist.
        """
        if cell.protocol == "target":
            return self._target(cell, rows)
        rounds = self._rounds(cell, rows)
        key = self.key(cell)
        if same := rows.same_run(key, rounds):
            return replace(same, method=cell.method, protocol=cell.protocol)
        method = self.methods[cell.method]
        able = str(SILO["name"]) if method.part == "able" else None
        weighed = method.kind == "lora" or method.changes == self.methods[END_TO_END].changes
        return Run(method.kind, self._complete(cell, rounds), able, cell.rates is None, weighed)

    def _rounds(self, cell: Cell, rows: Rows) -> int:
        """The number of rounds by the cell's protocol; 0 for a method that does not train."""
        if self.methods[cell.method].kind in UNTRAINED:
            return 0
        if cell.protocol == "steps":
            return rounds_for_steps(self._client_steps(cell), _LOCAL_STEPS * self._clients(cell))
        reference, own = (self._row(each, rows) for each in _reference_and_own(cell))
        assert own.rounds, "a run at equal steps has rounds"
        if cell.method == END_TO_END and cell.protocol != "half-compute":
            return own.rounds
        if cell.protocol == "bytes":
            sent = float(reference.bytes_sent or 0)
            return rounds_for(sent, own.fixed_bytes, own.bytes_per_round, own.stages, own.rounds)
        seconds = (reference.client_cpu_seconds or 0.0) * (0.5 if cell.protocol == "half-compute" else 1.0)
        a_round = own.step_cpu_seconds * (own.client_steps or 0) / own.rounds
        return rounds_for(seconds, own.fixed_cpu_seconds, a_round, own.stages, own.rounds)

    def _target(self, cell: Cell, rows: Rows) -> Row:
        """The row of what the method's run at equal compute had spent when it reached the target accuracy."""
        run = self._row(cell._replace(protocol="compute"), rows)
        target = self.target
        if target is None:
            target = self._row(_reference_and_own(cell)[0], rows).validation_accuracy
        assert target is not None
        there = reached(run.curve, target)
        steps, cpu_seconds, sent, seconds, _ = there or (None,) * 5
        return replace(
            run,
            protocol=cell.protocol,
            accuracy=target if there else None,
            validation_accuracy=there and there[4],
            client_steps=steps,
            client_cpu_seconds=cpu_seconds,
            bytes_sent=sent,
            seconds=seconds,
            rounds=None,
            curve=(),
            options=self.key(cell).options,
        )

    def _row(self, cell: Cell, rows: Rows) -> Row:
        if row := rows.find(self.key(cell)):
            return row
        raise KeyError(cell)

    def _client_steps(self, cell: Cell) -> int:
        return self.client_steps or self.corpora[cell.dataset].client_steps

    def _clients(self, cell: Cell) -> int:
        """The number of clients in a round."""
        able = int(str(SILO["count"])) if self.methods[cell.method].part == "able" else _CLIENTS
        return min(able, _CLIENTS)

    def _document(self, cell: Cell) -> Document:
        """The job's document, without the keys that a row has under other names, and without the number of rounds."""
        method = self.methods[cell.method]
        rounds: Document = {
            "clients": self._clients(cell),
            "local_steps": _LOCAL_STEPS,
            "batch_size": 16,
            "convergence": {"rule": "none"},
        }
        if rates := cell.rates or method.rates:
            rounds |= {"learning_rate": rates[0], "head_learning_rate": rates[1]}
        classes = [group | {"memory": _UNLIMITED} if method.part == "anyone" else group for group in (PHONE, SILO)]
        document: Document = {
            "model": {"base": self.base},
            "data": {"max_length": self.corpora[cell.dataset].max_length},
            "fleet": {"clients": classes},
            "rounds": rounds,
            "evaluation": {"every": self.evaluate_every or "stage"},
        }
        return merged(document, method.changes)

    def _complete(self, cell: Cell, rounds: int) -> Document:
        partition: Document = {"scheme": "iid"} if cell.alpha is None else {"scheme": "dirichlet", "alpha": cell.alpha}
        named: Document = {
            "name": "accuracy",
            "data": self.corpora[cell.dataset].sources,
            "fleet": {"partition": partition},
            "rounds": {"total": max(rounds, 1)},
            "seed": cell.seed,
        }
        return merged(self._document(cell), named)


def _reference_and_own(cell: Cell) -> tuple[Cell, Cell]:
    """The cells of end-to-end training and of the cell's own method, both at equal steps."""
    own = cell._replace(protocol="steps")
    return own._replace(method=END_TO_END), own
