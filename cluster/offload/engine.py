"""Chooses the engine that evaluates the whole model: the one that the job names, or torch if DeepSpeed cannot run here."""

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.client.turn import warm_up
from chainfed_ray.evaluation.evaluator import Evaluator
from chainfed_ray.federation.evaluation import ServerEvaluation, sets_of, streaming
from chainfed_ray.planning.prepare import PlannedJob


def server_evaluation(job: PlannedJob, listen: Listener = no_listener) -> ServerEvaluation:
    """The evaluations of ``job``. Call it in a process that is connected to Ray.

    If the job names DeepSpeed but it cannot run here, the torch engine streams the layers instead. The job's record says why.
    """
    # Early exits are evaluated in this process, and their peak memory is measured. Libraries allocate memory on first use,
    # so use them now: otherwise the first peak would include it.
    Reporter("warming up for evaluations", listen).begin()
    warm_up(job.base)
    wanted = job.spec.evaluation
    if wanted.engine == "torch":
        return ServerEvaluation(job, streaming(job, listen), listen=listen)
    evaluator = _offloaded(job, listen)
    if isinstance(evaluator, str):
        return ServerEvaluation(job, streaming(job, listen), f"in place of {wanted.engine}: {evaluator}", listen)
    return ServerEvaluation(job, evaluator, listen=listen)


def _offloaded(job: PlannedJob, listen: Listener) -> Evaluator | str:
    """The evaluator that uses DeepSpeed, or a sentence on why it cannot run here."""
    # Ray Train takes seconds to import, and only this engine needs it.
    from chainfed_ray.cluster.offload.evaluator import make_evaluator

    workers = job.spec.evaluation.workers
    return make_evaluator(job.base, job.planner.costs, sets_of(job), workers=workers, listen=listen)
