"""Writes scores out: the accuracy of a classifier, the perplexity of a language model."""

from chainfed_ray.records.rounds import Evaluation
from chainfed_ray.spec.sections import ModelSpec
from chainfed_ray.units import format_bytes, format_seconds, perplexity


def is_causal(model: ModelSpec) -> bool:
    """True if the job tunes ``model`` as a causal language model, and False for a classifier."""
    return model.task == "causal-lm"


def short_score(model: ModelSpec, loss: float | None, accuracy: float | None) -> str:
    """A classifier's accuracy, such as "72.8%", or a language model's perplexity, such as "14.2".

    A dash if nothing was measured, or the loss was not finite.
    """
    if is_causal(model):
        return "–" if loss is None or accuracy is None else f"{perplexity(loss):.4g}"
    return "–" if accuracy is None else f"{accuracy:.1%}"


def evaluation_line(model: ModelSpec, found: Evaluation) -> str:
    """An evaluation of the whole model in a sentence."""
    if found.loss is None:
        return f"The whole model could not be evaluated by {found.engine}: {found.failure}"
    if is_causal(model):
        scores = (
            f"perplexity {short_score(model, found.loss, found.accuracy)}, {found.accuracy:.1%} of the tokens right"
        )
    else:
        scores = f"{found.accuracy:.1%} right, macro-F1 {found.macro_f1:.3f}"
    if found.choice_accuracy is not None:
        scores += f", {found.choice_accuracy:.1%} of the questions right"
    return f"The whole model: {scores} ({found.engine}, {format_seconds(found.seconds)}{_memory(found)})."


def _memory(found: Evaluation) -> str:
    if found.peak_bytes is None or found.planned_bytes is None:
        return ""
    return f", peak {format_bytes(found.peak_bytes)} of {format_bytes(found.planned_bytes)} planned"
