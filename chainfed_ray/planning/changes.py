"""What single changes of a job would do: who could take part, or train the whole window, if one value were another.

The job's own planner is asked about a job with that value changed. Nothing is measured, and no row is read again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.planner import held_bytes
from chainfed_ray.data.tokens import Examples
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import known_profile_of, with_bottleneck
from chainfed_ray.planning.admission import Admission, Planner, admit, requirements_of
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.forecast import Change
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job

_HALVINGS = 3  # how often a value is halved in the search for one that lets more clients join


def changes(job: PlannedJob) -> Iterator[Change]:
    """The single changes of the job that would change who joins or, for the window, who trains all of it."""
    for width in (job.window - 1, job.window + 1, 2 * job.window):
        if width >= 1 and width + job.planner.requirements.start <= job.layers:
            yield from _window_change(job, width)
    if job.admission.excluded:
        spec = job.spec
        key = "rank" if job.lora else "bottleneck"
        if not spec.fleet.has_ranks:  # a class may have more ranks than a smaller number
            yield from _joining(job, f"chain.adapter.{key}", _halvings(spec.chain.adapter.width, 1))
        yield from _joining(job, "chain.head_layers", _halvings(job.head_layers, 1))
        yield from _joining(job, "data.max_length", _halvings(spec.data.max_length, 2))
        yield from _joining(job, "rounds.batch_size", [2 * spec.rounds.batch_size])
        yield from _joining(job, "model.dtype", ["bfloat16"] if _could_hold_the_stack(job) else [])


def _could_hold_the_stack(job: PlannedJob) -> bool:
    """True if any excluded client has more memory than the stack takes.

    The stack is in float32 whatever the model's dtype. If no excluded client can hold it, another dtype lets nobody join, and
    the dry run does not trace the memory of the model's parts in that dtype.
    """
    held = held_bytes(job.planner.costs, job.planner.requirements)
    return any(candidate.memory > held for candidate, _ in job.admission.excluded)


def _halvings(value: int, least: int) -> list[int]:
    return [smaller for halved in range(1, _HALVINGS + 1) if (smaller := value >> halved) >= least]


def _window_change(job: PlannedJob, width: int) -> Iterator[Change]:
    now, then = job.admission, _readmit(job, changed(job.spec, "chain.window", width))
    whole = sum(len(plan.window) == width for _, plan in then.admitted)
    delta = len(then.admitted) - len(now.admitted)
    narrower_now = any(len(plan.window) < job.window for _, plan in now.admitted)
    if then.width == width and (delta or width > job.window or narrower_now):
        joins, layers = len(then.admitted), f"all {width} layers together" if width > 1 else "one layer at a time"
        words = f"{_words(job, 'chain.window', width, delta)}; {whole} of {joins} train {layers}"
        yield Change(field="chain.window", value=width, joins=joins, joins_delta=delta, words=words)


def _joining(job: PlannedJob, field: str, values: Sequence[int | str]) -> Iterator[Change]:
    """Yield the changes of ``field`` that let more clients join. Each lets more join than those before it in ``values``.

    The last value needs the least memory, so if it lets nobody join, none does.
    """
    most = len(job.admission.admitted)
    if not values or _joins(job, field, values[-1]) <= most:
        return
    for value in values:
        joins = _joins(job, field, value)
        if joins > most:
            delta = joins - len(job.admission.admitted)
            yield Change(
                field=field, value=value, joins=joins, joins_delta=delta, words=_words(job, field, value, delta)
            )
            most = joins


def _joins(job: PlannedJob, field: str, value: int | str) -> int:
    return len(_readmit(job, changed(job.spec, field, value)).admitted)


def changed(spec: JobSpec, field: str, value: int | str) -> JobSpec:
    """The job with ``value`` at the path ``field``, such as ``chain.window``."""
    document = spec.document()
    *sections, key = field.split(".")
    section = document
    for name in sections:
        section = section[name]
    section[key] = value
    return parse_job(document)


def _readmit(job: PlannedJob, spec: JobSpec) -> Admission:
    """Who takes part in the job ``spec``, which differs from ``job`` in one value. The data is not read again."""
    everybody = [candidate for candidate, _ in (*job.admission.admitted, *job.admission.excluded)]
    if spec.data.max_length < job.spec.data.max_length:
        everybody = [replace(one, examples=_cut(one.examples, spec.data.max_length)) for one in everybody]
    requirements = requirements_of(spec.chain, spec.rounds, spec.lowest_start(job.layers))
    return admit(Planner(_memory_profile(job, spec), requirements), everybody, spec.window(job.layers))


def _memory_profile(job: PlannedJob, spec: JobSpec) -> MemoryProfile:
    """The memory profile of ``spec``. Parts that are the same as in ``job`` are not traced again."""
    head_layers, width = spec.chain.head_layers or job.head_layers, spec.chain.adapter.width
    if spec.model == job.spec.model and head_layers == job.head_layers:
        if width == job.spec.chain.adapter.width:
            return job.planner.costs
        if not job.lora:
            return with_bottleneck(job.planner.costs, job.base.dtype, width)
    blocks = Blocks(job.base.folder, getattr(torch, spec.model.dtype))
    try:
        return known_profile_of(blocks, width, job.class_count, head_layers, job.lora)
    finally:
        blocks.close()


def _cut(examples: Examples, tokens: int) -> Examples:
    """The examples, each cut to ``tokens`` tokens in length. The ids no longer match: planning reads the lengths only."""
    offsets = np.concatenate([[0], np.cumsum(np.minimum(examples.lengths, tokens))])
    targets = None if examples.targets is None else examples.targets[: offsets[-1]]
    return Examples(examples.ids[: offsets[-1]], offsets, examples.labels, targets)


def _words(job: PlannedJob, field: str, value: int | str, delta: int) -> str:
    """A change in words, such as "window 3 excludes 31 of 100 clients" or "bottleneck 32 lets 4 more join"."""
    name = field.removeprefix("chain.").removeprefix("adapter.")
    admitted, excluded = len(job.admission.admitted), len(job.admission.excluded)
    if delta > 0:
        return f"{name} {value} lets {delta} more join"
    if delta < 0:
        return f"{name} {value} excludes {excluded - delta} of {admitted + excluded} clients"
    return f"{name} {value} excludes nobody else"
