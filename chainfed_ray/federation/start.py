"""Finds the start layer of a chain, the lowest layer with an adapter.

``chain.start`` of the job chooses the rule. A number is the layer itself, ``last`` that of the model's last window. ``auto``
is the paper's rule (FOAT): the chain starts at the first layer whose output differs enough from the embeddings, by CKA.
``best-exit`` is our own rule: a head in closed form is fitted to the untrained model at the top of each window, and the chain
starts at the window whose head has the least held-out loss. The layers above that window do worse, so training them can gain
the most.
"""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.aggregation.checks import check_claims
from chainfed_ray.chain import Chain, Window, start_below
from chainfed_ray.client.first_pass import StartGuess
from chainfed_ray.client.messages import Client, Fitting, Profile, Profiling, TurnResult
from chainfed_ray.client.pool import ClientPool, Failure, in_order
from chainfed_ray.client.profiling import FEWEST_FOR_CKA
from chainfed_ray.errors import InvalidUpdate, QuorumLost
from chainfed_ray.federation.cohort import everyone
from chainfed_ray.federation.collect import failed_turn, readable, reasons
from chainfed_ray.federation.head_fitting import deadline_of_all, fit_head
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.rounds import FailedTurn, HeadFit, complete_fits
from chainfed_ray.seeds import derive

_MOST_CKA = 1.01  # allows for rounding


class Start(NamedTuple):
    """The start layer, and how it was found: the mean CKA of each layer, or the head fitted at each early exit.

    ``failed_turns`` has at most one failed turn per client; ``cpu_seconds`` is the sum over the clients.
    """

    layer: int
    cka: tuple[float, ...] = ()
    exits: tuple[HeadFit, ...] = ()
    failed_turns: tuple[FailedTurn, ...] = ()
    cpu_seconds: float = 0.0


StartRule = Callable[[PlannedJob, ClientPool, Listener], Start]
"""A rule that gives the start of a job's chain. ``find_start`` is one. A rule may look at the job, or give orders to clients
through the pool.
"""


def find_start(job: PlannedJob, pool: ClientPool, listen: Listener = no_listener) -> Start:
    """Find the start of the chain of ``job`` by the rule that its key ``chain.start`` names.

    Raises:
        QuorumLost: no client sent a profile, or no client sent the sums for a head.
    """
    match job.spec.chain.start:
        case "auto":
            return _by_profiles(job, pool, listen)
        case "best-exit":
            return _by_exits(job, pool, listen)
        case "last":
            return Start(job.layers - job.window)
        case layer:
            return Start(layer)


def _by_profiles(job: PlannedJob, pool: ClientPool, listen: Listener) -> Start:
    """Start by the clients' CKA profiles, averaged by example count in client order (FOAT).

    If a head is to be fitted next, its sums need all examples of a client. They then all go through the model in this pass.
    """
    able = [
        replace(client, cap_bytes=client.plan.prefix.profile_bytes)
        for client in job.clients
        if client.counts.examples >= FEWEST_FOR_CKA and client.plan.prefix.cached
    ]
    chain = job.spec.chain
    fits = chain.head == "fitted"
    guess = StartGuess(chain.cka_threshold, job.window, job.head_layers) if fits else None
    order = Profiling(chain.profile_examples, derive(job.spec.seed, "profile"), guess)
    deadline = deadline_of_all(job, len(able)) if fits else job.spec.rounds.deadline
    turns = pool.run(able, order, deadline)
    turns = Reporter("profiling the layers", listen).each(turns, len(able), "clients")
    profiles, failed = list[tuple[Profile, int]](), list[FailedTurn]()
    for place, result in in_order(turns, len(able)):
        client = able[place]
        if not isinstance(result, Failure):
            try:
                with readable(client):
                    profile = _checked(client, result, job.layers)
                # The weight is what the server dealt, and not what a client says.
                profiles.append((profile, min(client.counts.examples, order.examples)))
                continue
            except InvalidUpdate as error:
                result = Failure(f"its profile was refused: {error.reason}")
        failed.append(failed_turn(client, result))
    if not profiles:
        raise QuorumLost("profiling the layers", 1, reasons(failed))
    cka = _average([(profile.cka, examples) for profile, examples in profiles])
    layer = start_below(cka, chain.cka_threshold, job.window)
    return Start(layer, cka, (), tuple(failed), sum(profile.cpu_seconds for profile, _ in profiles))


def _checked(client: Client, result: TurnResult, layers: int) -> Profile:
    """The client's profile, if it is one of as many layers as the model has.

    Raises:
        InvalidUpdate: it is not.
    """
    if not isinstance(result, Profile):
        raise InvalidUpdate(client.name, f"it is a {type(result).__name__}")
    if len(result.cka) != layers or not all(
        isinstance(value, float) and abs(value) <= _MOST_CKA for value in result.cka
    ):
        raise InvalidUpdate(client.name, f"its CKA is {reprlib.repr(result.cka)}, not {layers} numbers from -1 to 1")
    check_claims(client.name, result.peak_bytes, cpu_seconds=result.cpu_seconds)
    return result


def _by_exits(job: PlannedJob, pool: ClientPool, listen: Listener) -> Start:
    """Start at the window at whose top a head in closed form has the least held-out loss.

    If no head can be fitted with all clients, the chain starts at the last window.
    """
    windows = Chain(job.layers, 0, job.window).windows
    if len(windows) == 1:
        return Start(0)  # the only window holds all layers
    of = f"of {len(windows)}"
    fits = tuple(
        _fit_at_exit(job, pool, window.top, Reporter(f"fitting a head to exit {place} {of}", listen))
        for place, window in enumerate(windows, start=1)
    )
    failed = tuple({turn.client: turn for fit in fits for turn in fit.failed_turns}.values())  # each client once
    if not any(fit.examples for fit in fits):
        raise QuorumLost("fitting heads to find the chain's start", 1, reasons(failed))
    # A head that was fitted with fewer clients than others cannot be compared with them.
    whole = complete_fits(fits)
    layer = least_loss_start([fit.held_out_loss if counts else None for fit, counts in zip(fits, whole, strict=True)])
    found = windows[-1].bottom if layer is None else layer
    return Start(found, (), fits, failed, sum(fit.cpu_seconds for fit in fits))


def least_loss_start(losses: Sequence[float | None]) -> int | None:
    """The index of the least of ``losses``; None if all are missing.

    Of equal losses the highest index wins: its chain has the fewest stages.
    """
    found = [(loss, -place) for place, loss in enumerate(losses) if loss is not None]
    return -min(found)[1] if found else None


def _fit_at_exit(job: PlannedJob, pool: ClientPool, layer: int, reporter: Reporter) -> HeadFit:
    """Fit a head to the output of ``layer`` of the base model.

    The head takes this one layer, since the clients' sums grow with the square of its features.
    """
    # A window of one layer is all prefix: its bottom layer's output is in the cache. The next exit advances the cache by one
    # layer. The job's own planner is used for every exit, so that each computes the prefix in the same micro-batches.
    window = Window(layer, layer)
    clients = everyone(job.planner, (candidate for candidate, _ in job.admitted), window, ())
    width, seed = job.spec.chain.adapter.width, derive(job.spec.seed, "stack")
    stack = AdapterStack.new(window, job.hidden, width, job.class_count, seed)  # whatever the job's own adapters are
    return fit_head(job, pool, clients, Fitting(stack.tensors(), window, layer), reporter).record


def _average(profiles: Sequence[tuple[Sequence[float], int]]) -> tuple[float, ...]:
    """The mean CKA of each layer over clients. ``profiles`` has each client's CKA by layer, and its examples as the weight."""
    values = torch.tensor([list(profile) for profile, _ in profiles], dtype=torch.float64)
    weights = torch.tensor([examples for _, examples in profiles], dtype=torch.float64)
    return tuple(((values * weights[:, None]).sum(0) / weights.sum()).tolist())
