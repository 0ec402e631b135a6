"""Which engine judges the whole model of a job: the one that it asks for, where this machine has what that needs."""

from chainfed_ray.job import Job
from chainfed_ray.judging import Judging, sets_of, streaming
from chainfed_ray.turn import warm_up


def judging(job: Job) -> Judging:
    """The judgements of ``job``, in a process that is connected to Ray. Where offloading cannot work, layers are streamed."""
    wanted = job.spec.evaluation
    if wanted.engine == "torch":
        return _streamed(job, instead=None)
    from cluster.offload import make_evaluator  # Ray Train takes seconds to import, and only this needs it

    made = make_evaluator(job.base, job.planner.costs, sets_of(job), workers=wanted.workers)
    if isinstance(made, str):
        return _streamed(job, instead=f"in place of {wanted.engine}: {made}")
    return Judging(job, made)


def _streamed(job: Job, instead: str | None) -> Judging:
    """In this process, whose peak is what counts: what libraries load and keep the first time comes before it."""
    warm_up(job.base)
    return Judging(job, streaming(job), instead)
