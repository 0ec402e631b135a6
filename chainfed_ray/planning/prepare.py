"""Plans a job: from a ``JobSpec`` to what a coordinator needs.

A job that cannot run is refused here, before anything starts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import Chain
from chainfed_ray.client.messages import Client
from chainfed_ray.client.profiling import FEWEST_FOR_CKA
from chainfed_ray.data.choices import Choices
from chainfed_ray.data.examples import examples_of, spelled_out
from chainfed_ray.data.partition import PartitionRule, shares_of
from chainfed_ray.data.targets import packed
from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import configuration, tokenizer
from chainfed_ray.model.adapters import AdapterStack, Head, LoraShapes
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.model.source import ModelSource, weights_folder
from chainfed_ray.planning.accountant import Ledger
from chainfed_ray.planning.admission import Admission, Planner, admit, requirements_of
from chainfed_ray.planning.base_model import about_the_model, traced
from chainfed_ray.planning.candidates import Candidate, absent_clients, as_client, awaited, candidates, classes_at_sites
from chainfed_ray.planning.manifest import manifest_of, partitions_of
from chainfed_ray.planning.sites import Sites
from chainfed_ray.problem import some_of
from chainfed_ray.record import named
from chainfed_ray.records.fleet import ExcludedClients, FleetClient, names_hash
from chainfed_ray.records.manifest import Manifest
from chainfed_ray.records.rounds import JobStarted
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import ModelSpec, PrivacySpec, RoundsSpec
from chainfed_ray.units import format_bytes


@dataclass(frozen=True)
class PlannedJob:
    """A job as it is planned: the base model, which clients take part and how, and the server's held-out examples.

    ``absent`` are clients whose site takes no part; ``sites_unasked`` says that there are sites which were not asked yet.
    ``layers`` is L, the base model's layers; ``layers_path`` is where the model's module has them; ``hidden`` is D. ``lora``
    has the modules that a LoRA is on, if the job's adapters are LoRAs.
    """

    spec: JobSpec
    base: ModelSource
    layers: int
    layers_path: str
    hidden: int
    classes: tuple[str, ...]
    manifest: Manifest
    planner: Planner
    admission: Admission
    validation: Examples
    test: Examples
    choices: Choices | None
    partition: PartitionRule | None = None
    lora: LoraShapes | None = None
    absent: tuple[ExcludedClients, ...] = ()
    sites_unasked: bool = False

    @property
    def class_count(self) -> int | None:
        """C, the classes of the job's head; None for a language model, which keeps its own head."""
        return None if self.spec.model.task == "causal-lm" else len(self.classes)

    def saved(self, stack: AdapterStack, index: int | None) -> SavedStack:
        """The stack of the job after round ``index``, with the classes and the base model it needs."""
        data, base = self.spec.data, self.spec.model.weights
        return SavedStack(stack, self.classes, data.max_length, base, self.layers_path, index)

    @property
    def head_layers(self) -> int:
        """The number of layers whose pooled features the job's head takes."""
        return self.planner.costs.head_layers

    @property
    def window(self) -> int:
        """Q, the adapters trained together."""
        return self.admission.width

    def new_stack(self, layers: Iterable[int], seed: int) -> AdapterStack:
        """A new stack that changes nothing, with adapters of the job's kind for ``layers``."""
        adapter = self.spec.chain.adapter
        if self.lora:
            head = None if self.class_count is None else Head(self.hidden, self.class_count, self.head_layers)
            return AdapterStack.new_lora({layer: self.lora[layer] for layer in layers}, adapter.rank, seed, head)
        return AdapterStack.new(layers, self.hidden, adapter.bottleneck, self.class_count, seed, self.head_layers)

    def chain_from(self, start: int) -> Chain:
        """The job's chain, if its lowest adapter is that of layer ``start``."""
        chain = self.spec.chain
        slide = min(chain.slide, self.window)  # no layer is skipped where no client holds the whole window
        return Chain(self.layers, start, self.window, slide, chain.direction, chain.look_ahead)

    @property
    def admitted(self) -> tuple[tuple[Candidate, TurnPlan], ...]:
        """The clients that take part, each with its plan for the lowest window."""
        return self.admission.admitted

    @property
    def clients(self) -> tuple[Client, ...]:
        """The clients that take part, ready for a turn in the lowest window."""
        return tuple(as_client(candidate, plan, plan.planned_bytes) for candidate, plan in self.admitted)

    def check_begun_with(self, job_started: JobStarted, clients: Callable[[], Iterable[FleetClient]]) -> None:
        """Check that a resumed job has the rows and the clients with which it started.

        The clients' samples, and with privacy their ε, follow from both. ``clients`` gives the list from the start, for words.

        Raises:
            InvalidJob: the rows or the clients are not those of ``job_started``.
        """
        self.manifest.check_unchanged(job_started.partition_hash)
        now = [candidate.name for candidate, _ in self.admitted]
        if names_hash(now) != job_started.clients_hash:
            then = {client.client for client in clients() if client.plan is not None}
            gone, new = (some_of(sorted(each)) for each in (then - set(now), set(now) - then))
            expected = f"the clients that could take part when the job started (missing now: {gone}; new: {new})"
            raise InvalidJob.at("fleet.clients", f"{len(now)} that can take part", expected)


def prepare_job(
    spec: JobSpec,
    scratch: Path,
    listen: Listener = no_listener,
    partition: PartitionRule | None = None,
    sites: Sites | None = None,
) -> PlannedJob:
    """Plan a job, and check that enough clients can take part in it.

    Clients keep their prefix caches in ``scratch``. ``partition`` is the caller's own rule, in place of the job's. ``sites``
    answer for the clients whose rows they have; without them these clients, and the fleet, are not checked.

    Raises:
        InvalidJob: the job cannot run; each problem names the field, its value and what was expected.
    """
    job = plan_job(spec, scratch, listen, partition, sites)
    if not job.sites_unasked:
        check_fleet(job)
    return job


def plan_job(
    spec: JobSpec,
    scratch: Path,
    listen: Listener = no_listener,
    partition: PartitionRule | None = None,
    sites: Sites | None = None,
) -> PlannedJob:
    """Plan a job, step by step, even if too few clients can take part: a dry run shows such a job as well.

    Raises:
        InvalidJob: the job could not run with any clients.
    """
    # 1. Find the base model, and ask the sites what rows they have.
    base = _found(spec.model, scratch, listen)
    surveys = sites.survey(spec, base.folder, listen) if sites and spec.fleet.at_sites else {}
    unasked = any(group.name not in surveys for group in spec.fleet.at_sites)

    # 2. Read the rows, and turn them into tokens.
    elsewhere = None if unasked else classes_at_sites(spec.fleet, surveys)
    words = tokenizer(spec.model.base, base.folder)
    examples = examples_of(spec, words, listen, elsewhere)
    classes = () if spec.model.task == "causal-lm" else examples.corpus.classes

    # 3. Check them against the model, and trace how much memory each part of a turn holds.
    train = examples.train if examples.pack_length is None else packed(examples.train, examples.pack_length)
    spelled = partial(spelled_out, spec.data, words, examples.corpus)
    model = traced(spec, base, len(classes) or None, (train, *examples.held_out), spelled, listen)
    layers = model.memory.layers

    # 4. Partition the rows among the clients.
    shares = shares_of(spec.fleet, spec.seed, examples.train.labels, examples.corpus.train.groups, partition)
    everybody = candidates(spec.fleet, examples, classes, shares, surveys)
    partitions = partitions_of(everybody, examples.corpus.train.labels, shares, surveys)
    rule = named(partition) if partition else None
    manifest = manifest_of(spec.data, spec.fleet.partition, spec.seed, examples.corpus, partitions, rule)

    # 5. Plan which clients can take part, and how.
    planner = Planner(model.memory, requirements_of(spec.chain, spec.rounds, spec.lowest_start(layers)))
    admission = admit(planner, everybody, spec.window(layers), listen)
    return PlannedJob(
        spec=spec,
        base=base,
        layers=layers,
        layers_path=model.layers_path,
        hidden=model.memory.hidden,
        classes=classes,
        manifest=manifest,
        planner=planner,
        admission=admission,
        validation=examples.validation,
        test=examples.test,
        choices=examples.choices,
        partition=partition,
        lora=model.lora,
        absent=absent_clients(spec.fleet, surveys),
        sites_unasked=unasked,
    )


def _found(model: ModelSpec, scratch: Path, listen: Listener) -> ModelSource:
    """The base model, once its files are here. Clients keep their prefix caches in ``scratch``.

    Raises:
        InvalidJob: it cannot be had, or its configuration cannot be read.
    """
    Reporter("finding the base model", listen).begin()
    folder = weights_folder(model.weights)
    with about_the_model(model.base):
        configuration(folder)
    return ModelSource(folder, getattr(torch, model.dtype), scratch)


def check_fleet(job: PlannedJob) -> None:
    """Check that a quorum of clients can take part, that the chain's start can be found, and that ε allows a round.

    Raises:
        InvalidJob: one of these does not hold.
    """
    spec, admission = job.spec, job.admission
    if spec.quorum > len(admission.admitted):
        raise _too_few(job)
    if spec.chain.start == "auto":
        _check_profiles(admission)
    if spec.privacy:
        _check_epsilon(spec.privacy, spec.rounds, len(admission.admitted) + len(awaited(spec.fleet, job.absent)))


def _too_few(job: PlannedJob) -> InvalidJob:
    """The error for a fleet of which fewer than a quorum can take part: what its clients lack, or why their sites are away."""
    quorum, groups, admission = job.spec.quorum, job.spec.fleet.clients, job.admission
    if not admission.excluded:
        told = some_of([f"{each.client_class}: {each.reason}" for each in job.absent] or ["there are no more"], "; ")
        expected = f"{quorum} clients (the quorum) that can take part; {len(admission.admitted)} can ({told})"
        return InvalidJob.at("fleet.clients", [group.name for group in groups], expected)
    largest, shortfall = max(admission.excluded, key=lambda excluded: excluded[0].memory)
    return InvalidJob.at(
        "fleet.clients",
        [f"{group.name}: {format_bytes(group.memory)}" for group in groups],
        f"{quorum} clients (the quorum) with {format_bytes(largest.memory + shortfall)} or more, since "
        f"{len(admission.admitted) or 'none'} of them can hold any window at data.max_length {job.spec.data.max_length}",
    )


def _check_profiles(admission: Admission) -> None:
    """Check that any client can profile the layers, which finds the chain's start."""
    if not any(one.counts.examples >= FEWEST_FOR_CKA and plan.prefix.cached for one, plan in admission.admitted):
        raise InvalidJob.at(
            "chain.start",
            "auto",
            f"the index of a layer, since no client has both the {FEWEST_FOR_CKA} rows that a profile needs and the disk for "
            "their activations",
        )


def _check_epsilon(privacy: PrivacySpec, rounds: RoundsSpec, clients: int) -> None:
    """Check that the limit of ε allows a round of a job with so many ``clients``."""
    if (ledger := Ledger(privacy, rounds, clients)).total == 0:
        expected = f"{ledger.spent(1):.3g} or more: the first round costs that with {clients} clients"
        raise InvalidJob.at("privacy.epsilon", privacy.epsilon, expected)
