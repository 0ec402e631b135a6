"""Checks the keys of a job against each other, after each key has been checked by itself. Each rule yields its problems."""

from collections import Counter
from collections.abc import Iterator

from chainfed_ray.problem import MISSING, Problem
from chainfed_ray.reading import NF4
from chainfed_ray.spec.fleet import PartitionSpec
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import AdapterSpec, AggregationSpec, ChainSpec, DataSpec, ModelSpec, PrivacySpec


def contradictions(spec: JobSpec) -> list[Problem]:
    """The problems between fields that are valid one by one."""
    if not spec.fleet.clients:
        return [Problem("fleet.clients", [], "at least one class of clients")]
    problems = []
    names = [group.name for group in spec.fleet.clients]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems.append(Problem(f"fleet.clients[{index}].name", name, "a name that no other class has"))
    problems += _of_partition(spec.fleet.partition)
    problems += _of_sites(spec)
    problems += _of_model(spec.model)
    problems += _of_task(spec)
    count = spec.fleet.size + len(spec.fleet.at_sites)
    # How many clients a site has is known when the job starts.
    if spec.rounds.clients > count and not spec.fleet.at_sites:
        problems.append(Problem("rounds.clients", spec.rounds.clients, f"at most {count}, the clients in the fleet"))
    elif spec.aggregation.fewest > spec.rounds.clients:
        problems.append(Problem("rounds.clients", spec.rounds.clients, _for_krum(spec.aggregation)))
    elif spec.quorum > spec.rounds.clients:
        problems.append(Problem("rounds.quorum", spec.quorum, f"at most {spec.rounds.clients}, rounds.clients"))
    elif spec.aggregation.fewest > spec.quorum:
        problems.append(Problem("rounds.quorum", spec.quorum, _for_krum(spec.aggregation)))
    problems += _of_aggregation(spec)
    problems += _of_start(spec)
    problems += _of_look_ahead(spec.chain)
    problems += _of_adapter(spec)
    problems += _of_ranks(spec)
    problems += _of_evaluation(spec)
    if spec.privacy:
        problems += _of_privacy(spec, spec.privacy, count)
    return problems


def _of_privacy(spec: JobSpec, privacy: PrivacySpec, clients: int) -> Iterator[Problem]:
    """The features that ``privacy`` cannot be combined with."""
    if spec.aggregation.rule != "mean":
        yield Problem("aggregation.rule", spec.aggregation.rule, "'mean': the privacy accountant covers no other rule")
    if spec.chain.head == "fitted":
        expected = "'zero': privacy does not cover the sums that a fitted head is computed from"
        yield Problem("chain.head", spec.chain.head, expected)
    if privacy.delta >= 1 / clients:
        expected = (
            f"less than 1/{clients}, one over the number of clients: a larger δ would allow one client to be revealed"
        )
        yield Problem("privacy.delta", privacy.delta, expected)


def _of_aggregation(spec: JobSpec) -> Iterator[Problem]:
    """A robust rule protects updates alone: one client can poison a fitted head's plain sums. A rate needs an optimizer."""
    rule = spec.aggregation.rule
    if rule != "mean" and spec.chain.head == "fitted":
        expected = f"'zero' with aggregation.rule {rule}: a fitted head uses plain sums, which one client can poison"
        yield Problem("chain.head", spec.chain.head, expected)
    if spec.aggregation.optimizer == "none" and spec.aggregation.server_learning_rate is not None:
        rate = spec.aggregation.server_learning_rate
        yield Problem(
            "aggregation.server_learning_rate",
            rate,
            "no value, unless aggregation.optimizer is set: it is the rate of that optimizer",
        )


def _of_model(model: ModelSpec) -> Iterator[Problem]:
    """Weights are quantized once, by one key."""
    if model.base.endswith(NF4):
        yield Problem("model.base", model.base, f"a name without {NF4}: model.quantization says it")
    elif model.quantization != "none" and (model.base.lower().endswith(".gguf") or model.base == "builtin:smollm2"):
        expected = "'none' for a GGUF file, whose matrices stay quantized as they are"
        yield Problem("model.quantization", model.quantization, expected)


def _of_task(spec: JobSpec) -> Iterator[Problem]:
    """Keys that belong to the other task, and keys of columns that must be given together."""
    data, causal = spec.data, spec.model.task == "causal-lm"
    if causal and spec.chain.head != "model":
        yield Problem(
            "chain.head", spec.chain.head, "'model' for model.task causal-lm: a language model has its own head"
        )
    if not causal and spec.chain.head == "model":
        yield Problem("chain.head", spec.chain.head, "'fitted' or 'zero', unless model.task is causal-lm")
    if causal and spec.chain.head_layers not in (None, 1):
        yield Problem(
            "chain.head_layers",
            spec.chain.head_layers,
            "1 for model.task causal-lm: a language model's own head uses one layer",
        )
    given = [("data.prompt", data.prompt), ("data.response", data.response), ("data.messages", data.messages)]
    given.append(("evaluation.choices", spec.evaluation.choices))
    for key, value in given:
        if value is not None and not causal:
            yield Problem(key, value, "no value, unless model.task is causal-lm")
    if data.messages is not None and data.prompt is not None:
        yield Problem(
            "data.prompt",
            data.prompt,
            "no value beside data.messages: a row is either a chat or a prompt with a response",
        )
    (form, column), *_ = data.columns
    # A job's document spells out its defaults. So only a value other than the default shows that the user gave the key.
    if causal and form != "data.text" and data.text != DataSpec.model_fields["text"].default:
        expected = f"no value beside {form}, which is {column!r}: a row has one of the two forms"
        yield Problem("data.text", data.text, expected)
    if (data.prompt is None) != (data.response is None):
        missing = "data.prompt" if data.prompt is None else "data.response"
        yield Problem(
            missing, MISSING, "the column that goes with " + ("data.response" if data.prompt is None else "data.prompt")
        )


def _of_start(spec: JobSpec) -> Iterator[Problem]:
    """The automatic starts need profiles or sums from the clients, which privacy, robust rules or other heads rule out."""
    start, rule, head = spec.chain.start, spec.aggregation.rule, spec.chain.head
    if isinstance(start, int) or start == "last":
        return
    if spec.privacy:
        expected = f"the index of a layer: privacy does not cover what clients send to find {start!r}"
        yield Problem("chain.start", start, expected)
    elif rule != "mean":
        sent = "a plain mean of profiles" if start == "auto" else "plain sums"
        yield Problem(
            "chain.start", start, f"the index of a layer with aggregation.rule {rule}: {start!r} follows from {sent}"
        )
    elif start == "best-exit" and head != "fitted":
        expected = f"'auto' or the index of a layer with chain.head {head}: 'best-exit' compares fitted heads"
        yield Problem("chain.start", start, expected)


def _of_adapter(spec: JobSpec) -> Iterator[Problem]:
    """Keys of the other kind of adapter, and what a LoRA cannot be combined with."""
    adapter, fields = spec.chain.adapter, AdapterSpec.model_fields
    other = ("rank", "targets") if adapter.kind == "bottleneck" else ("bottleneck",)
    for key in other:
        if (value := getattr(adapter, key)) != fields[key].default:
            yield Problem(f"chain.adapter.{key}", value, f"no value with chain.adapter.kind {adapter.kind}")
    if adapter.kind == "lora" and spec.chain.look_ahead == "adapters":
        expected = "'exact' or 'none' with chain.adapter.kind lora: a LoRA cannot stand in for its layer"
        yield Problem("chain.look_ahead", spec.chain.look_ahead, expected)


def _of_ranks(spec: JobSpec) -> Iterator[Problem]:
    """What classes of clients with a rank of their own need: LoRAs of as many ranks, and a mean over those that train each."""
    adapter, rule = spec.chain.adapter, spec.aggregation.rule
    for index, group in enumerate(spec.fleet.clients):
        if group.rank is None:
            continue
        expected = None
        if adapter.kind != "lora":
            expected = f"no value with chain.adapter.kind {adapter.kind}, which has no rank"
        elif group.rank > adapter.rank:
            expected = f"at most {adapter.rank}, chain.adapter.rank"
        elif spec.privacy:
            expected = "no value with privacy: over how many clients a rank is averaged would tell who was sampled"
        elif rule != "mean":
            expected = f"no value with aggregation.rule {rule}, which compares whole tensors"
        elif (optimizer := spec.aggregation.optimizer) != "none":
            expected = f"no value with aggregation.optimizer {optimizer}, which would move ranks that nobody trained"
        if expected:
            yield Problem(f"fleet.clients[{index}].rank", group.rank, expected)


def _of_look_ahead(chain: ChainSpec) -> Iterator[Problem]:
    """Keys that belong to another look-ahead. As above, only values other than the defaults show that the user gave them."""
    if chain.window is not None and chain.slide > chain.window:
        expected = f"at most {chain.window}, chain.window: a longer slide would leave layers out"
        yield Problem("chain.slide", chain.slide, expected)
    defaults = {key: ChainSpec.model_fields[key].default for key in ("global_weight", "global_trains")}
    for key, default in defaults.items() if chain.look_ahead != "adapters" else ():
        if (value := getattr(chain, key)) not in (0, default):
            expected = f"no value with chain.look_ahead {chain.look_ahead}: there is no global loss"
            yield Problem(f"chain.{key}", value, expected)
    if chain.direction == "down" and chain.look_ahead != "exact":
        expected = (
            "'exact' with chain.direction down: a window below trained adapters must know what they make of its output"
        )
        yield Problem("chain.look_ahead", chain.look_ahead, expected)


def _of_evaluation(spec: JobSpec) -> Iterator[Problem]:
    """Keys that need evaluations which the job does not have."""
    wanted, rule = spec.evaluation, spec.rounds.convergence.rule
    if wanted.every == "never" and rule == "plateau" and spec.chain.schedule == "staged":
        expected = (
            "'round', 'stage' or a number of rounds while rounds.convergence.rule is plateau, which needs the losses"
        )
        yield Problem("evaluation.every", wanted.every, expected)
    if wanted.whole_every == "never" and wanted.serve == "best":
        expected = "'last' while evaluation.whole_every is never: no round is evaluated, so none is the best"
        yield Problem("evaluation.serve", wanted.serve, expected)
    if wanted.whole_every == "never" and wanted.choices is not None:
        yield Problem("evaluation.choices", wanted.choices, "no value while evaluation.whole_every is never")
    if wanted.engine == "torch" and wanted.workers > 1:
        expected = "1 while evaluation.engine is torch, which is one process"
        yield Problem("evaluation.workers", wanted.workers, expected)


def _of_partition(partition: PartitionSpec) -> list[Problem]:
    if partition.scheme == "column" and partition.column is None:
        return [
            Problem("fleet.partition.column", MISSING, "the column whose values are to stay together on one client")
        ]
    if partition.scheme != "column" and partition.column is not None:
        expected = f"column, since fleet.partition.column is {partition.column!r}"
        return [Problem("fleet.partition.scheme", partition.scheme, expected)]
    return []


def _of_sites(spec: JobSpec) -> Iterator[Problem]:
    """What a client at a site needs, and what is said of simulated clients alone. Rows are needed somewhere."""
    for index, group in enumerate(spec.fleet.clients):
        path = f"fleet.clients[{index}]"
        if group.site is None:
            if group.data is not None:
                yield Problem(f"{path}.data", group.data, "no value without a site: the rows are a share of data.train")
            continue
        if group.data is None:
            yield Problem(f"{path}.data", MISSING, "`site:<path>`, a file in the folder that the site offers")
        for key, value in (("count", group.count), ("availability", group.availability), ("speed", group.speed)):
            if value != 1:
                expected = (
                    "1 for clients at a site: `chainfed join --split` makes several of a file, and none is simulated"
                )
                yield Problem(f"{path}.{key}", value, expected)
    yield from _of_rows(spec)


def _of_rows(spec: JobSpec) -> Iterator[Problem]:
    """Rows are needed somewhere, and classes once each."""
    data = spec.data
    if data.train is None and spec.fleet.size:
        description = DataSpec.model_fields["train"].description
        yield Problem("data.train", MISSING, description or "")
    if spec.evaluation.rows == "sites":
        yield from _of_rows_at_sites(spec)
    elif data.train is None and not spec.fleet.size:
        for name, source in (("data.validation", data.validation), ("data.test", data.test)):
            if source is None:
                expected = "held-out rows of the server, since without data.train there are none to hold out"
                yield Problem(name, MISSING, expected)
    if spec.fleet.at_sites and spec.model.task != "causal-lm" and data.label == data.text:
        yield Problem("data.label", data.label, "another column than data.text: the names of classes are told")
    if data.classes is not None:
        if spec.model.task == "causal-lm":
            yield Problem(
                "data.classes", list(data.classes[:3]), "no value, unless model.task is sequence-classification"
            )
        elif twice := [name for name, times in Counter(data.classes).items() if times > 1]:
            yield Problem("data.classes", twice[0], "each class once")


def _of_rows_at_sites(spec: JobSpec) -> Iterator[Problem]:
    """Without rows of the server, what needs them does not work."""
    if spec.fleet.size:
        expected = "'server', unless every client is at a site"
        yield Problem("evaluation.rows", spec.evaluation.rows, expected)
    data = spec.data
    given = (("data.train", data.train), ("data.validation", data.validation), ("data.test", data.test))
    for key, value in (*given, ("evaluation.choices", spec.evaluation.choices)):
        if value is not None:
            yield Problem(key, value, "no value with evaluation.rows sites: the server has no rows")
    if spec.evaluation.engine != "torch":
        expected = "'torch' with evaluation.rows sites: each site evaluates in its own process"
        yield Problem("evaluation.engine", spec.evaluation.engine, expected)
    if spec.privacy:
        expected = "'server' with privacy, which does not cover the scores that sites send"
        yield Problem("evaluation.rows", spec.evaluation.rows, expected)


def _for_krum(aggregation: AggregationSpec) -> str:
    return f"at least {aggregation.fewest}: Krum needs 2f + 3 updates, and aggregation.byzantine f is {aggregation.byzantine}"
