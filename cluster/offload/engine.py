"""Which engine judges the whole model of a job: the one that it asks for, where this machine has what that needs."""

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.client.turn import warm_up
from chainfed_ray.evaluation.evaluator import Evaluator
from chainfed_ray.federation.evaluation import ServerEvaluation, sets_of, streaming
from chainfed_ray.federation.prepare import PlannedJob


def judging(job: PlannedJob, listen: Listener = no_listener) -> ServerEvaluation:
    """The judgements of ``job``, in a process that is connected to Ray. Where offloading cannot work, layers are streamed."""
    # The early exit is judged here in any case, and its peak counts: what libraries keep the first time comes before it.
    Reporter("warming up for evaluations", listen).begin()
    warm_up(job.base)
    wanted = job.spec.evaluation
    if wanted.engine == "torch":
        return ServerEvaluation(job, streaming(job, listen), listen=listen)
    made = _offloaded(job, listen)
    if isinstance(made, str):
        return ServerEvaluation(job, streaming(job, listen), f"in place of {wanted.engine}: {made}", listen)
    return ServerEvaluation(job, made, listen=listen)


def _offloaded(job: PlannedJob, listen: Listener) -> Evaluator | str:
    from chainfed_ray.cluster.offload.evaluator import (
        make_evaluator,  # Ray Train takes seconds to import, and only this needs it
    )

    workers = job.spec.evaluation.workers
    return make_evaluator(job.base, job.planner.costs, sets_of(job), workers=workers, listen=listen)
