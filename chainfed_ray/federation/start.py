"""Where a chain starts: where its job says, where layers have moved from the embeddings (FOAT), or where heads read best.

The last is ours, not the paper's. The top of each window of the untrained model is an exit, at which a head can be fitted in
closed form. If that reads best below the last window, the layers above read worse, and training has something to win there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.chain import Chain, Window, start_below
from chainfed_ray.client.cka import FEWEST, average
from chainfed_ray.client.first_pass import StartGuess
from chainfed_ray.client.messages import Fitting, Profile, Profiling
from chainfed_ray.client.pool import ClientPool, Failure, in_order
from chainfed_ray.errors import QuorumLost
from chainfed_ray.federation.cohort import everyone
from chainfed_ray.federation.collect import failed_turn, reasons
from chainfed_ray.federation.head_fitting import deadline_of_all, fit_head
from chainfed_ray.federation.prepare import PlannedJob
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.records.rounds import FailedTurn, HeadFit, complete_fits
from chainfed_ray.seeds import derive


class Start(NamedTuple):
    """The lowest layer with an adapter, what was found in looking for it, a lost turn of each client that lost any, and CPU
    seconds.
    """

    layer: int
    cka: tuple[float, ...] = ()
    exits: tuple[HeadFit, ...] = ()
    failed_turns: tuple[FailedTurn, ...] = ()
    cpu_seconds: float = 0.0


StartRule = Callable[[PlannedJob, ClientPool, Listener], Start]
"""Where the chain of a job starts. ``find_start`` is one; one's own may look at the job, or ask clients through the pool."""


def find_start(job: PlannedJob, pool: ClientPool, listen: Listener = no_listener) -> Start:
    """Where the chain of ``job`` starts, as ``chain.start`` says.

    Raises:
        QuorumLost: no client sent what it takes to find out.
    """
    match job.spec.chain.start:
        case "auto":
            return _by_profiles(job, pool, listen)
        case "best-exit":
            return _by_exits(job, pool, listen)
        case layer:
            return Start(layer)


def _by_profiles(job: PlannedJob, pool: ClientPool, listen: Listener) -> Start:
    """The clients' CKA profiles, averaged by example count, in client order.

    Where every client's sums are needed next, for a fitted head, all its examples take part in this one pass.
    """
    able = [
        replace(client, cap_bytes=client.plan.prefix.profile_bytes)
        for client in job.clients
        if len(client.examples) >= FEWEST and client.plan.prefix.cached
    ]
    chain = job.spec.chain
    fits = chain.head == "fitted"
    guess = StartGuess(chain.cka_threshold, job.window, job.head_layers) if fits else None
    order = Profiling(chain.profile_examples, derive(job.spec.seed, "profile"), guess)
    deadline = deadline_of_all(job, len(able)) if fits else job.spec.rounds.deadline
    turns = pool.run(able, order, deadline)
    turns = Reporter("profiling the layers", listen).each(turns, len(able), "clients")
    outcomes = list(in_order(turns, len(able)))
    profiles = [outcome.result for outcome in outcomes if isinstance(outcome.result, Profile)]
    failures = ((able[place], result) for place, result in outcomes if isinstance(result, Failure))
    lost = tuple(failed_turn(client, failure) for client, failure in failures)
    if not profiles:
        raise QuorumLost("profiling the layers", 1, reasons(lost))
    cka = average([(profile.cka, profile.examples) for profile in profiles])
    layer = start_below(cka, chain.cka_threshold, job.window)
    return Start(layer, cka, (), lost, sum(profile.cpu_seconds for profile in profiles))


def _by_exits(job: PlannedJob, pool: ClientPool, listen: Listener) -> Start:
    """The window at whose top a head in closed form has the least held-out loss; the last, if none can be fitted."""
    windows = Chain(job.layers, 0, job.window).windows
    if len(windows) == 1:
        return Start(0)  # the chain can start nowhere else
    of = f"of {len(windows)}"
    fits = tuple(
        _exit(job, pool, window.top, Reporter(f"fitting a head to exit {place} {of}", listen))
        for place, window in enumerate(windows, start=1)
    )
    lost = tuple({turn.client: turn for fit in fits for turn in fit.failed_turns}.values())  # each client once
    if not any(fit.examples for fit in fits):
        raise QuorumLost("fitting heads to find the chain's start", 1, reasons(lost))
    # A head that lacks clients is no reason to start elsewhere.
    whole = complete_fits(fits)
    layer = least_loss_start([fit.held_out_loss if counts else None for fit, counts in zip(fits, whole, strict=True)])
    found = windows[-1].bottom if layer is None else layer
    return Start(found, (), fits, lost, sum(fit.cpu_seconds for fit in fits))


def least_loss_start(losses: Sequence[float | None]) -> int | None:
    """The place of the least of ``losses``, of which some may be missing; of equals the highest, with the fewest stages."""
    found = [(loss, -place) for place, loss in enumerate(losses) if loss is not None]
    return -min(found)[1] if found else None


def _exit(job: PlannedJob, pool: ClientPool, layer: int, reporter: Reporter) -> HeadFit:
    """A head on the output of ``layer`` of the base model. It reads no other: sums grow with the square of what is read."""
    # With nothing above its bottom layer a window is all prefix, which for the next exit is one layer more. The planner is that
    # of the whole chain, so that every exit makes it in the same way.
    window = Window(layer, layer)
    clients = everyone(job.planner, (candidate for candidate, _ in job.admitted), window, ())
    bottleneck, seed = job.spec.chain.adapter.bottleneck, derive(job.spec.seed, "stack")
    stack = AdapterStack.new(window, job.hidden, bottleneck, job.class_count, seed)
    return fit_head(job, pool, clients, Fitting(stack.tensors(), window), reporter).record
