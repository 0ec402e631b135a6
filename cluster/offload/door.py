"""The door to this room: makes the evaluator that has its weights on disk, and imports no sooner what that takes."""

from chainfed_ray.activity import Listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.evaluation.evaluator import EvaluationSets, Evaluator
from chainfed_ray.model.source import ModelSource


def make_disk_evaluator(
    base: ModelSource, profile: MemoryProfile, sets: EvaluationSets, *, workers: int, listen: Listener
) -> Evaluator | str:
    """The evaluator that uses DeepSpeed, or a sentence on why it cannot run here. See ``make_evaluator``.

    Call it in a process that is connected to Ray.
    """
    # Ray Train takes seconds to import, and only this evaluator needs it.
    from chainfed_ray.cluster.offload.evaluator import make_evaluator

    return make_evaluator(base, profile, sets, workers=workers, listen=listen)
