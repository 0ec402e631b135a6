"""Which engine judges the whole model of a job: the one that it asks for, where this machine has what that needs."""

from chainfed_ray.job import Job
from chainfed_ray.judging import Judging, sets_of, streaming


def judging(job: Job) -> Judging:
    """The judgements of ``job``, in a process that is connected to Ray. Where offloading cannot work, layers are streamed."""
    wanted = job.spec.evaluation
    if wanted.engine == "torch":
        return Judging(job, streaming(job))
    from cluster.offload import make_evaluator  # Ray Train takes seconds to import, and only this needs it

    made = make_evaluator(job.base, job.planner.costs, sets_of(job), workers=wanted.workers)
    if isinstance(made, str):
        return Judging(job, streaming(job), instead=f"in place of {wanted.engine}: {made}")
    return Judging(job, made)
