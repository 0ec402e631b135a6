"""Evaluates a stack on the rows that a client at this site holds out. Sums of scores leave the site, and no prediction."""

from time import process_time

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.server import evaluation_bytes
from chainfed_ray.client.messages import Client, Evaluating, Metrics
from chainfed_ray.client.progress import begin
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.cap import MemoryCap
from chainfed_ray.device.threads import one_thread
from chainfed_ray.evaluation.early_exit import predict_early_exit
from chainfed_ray.evaluation.score import ScoreSums
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.source import ModelSource


def evaluate(
    client: Client, base: ModelSource, memory: MemoryProfile, held_out: Examples, order: Evaluating
) -> Metrics:
    """The sums of the scores of ``client`` on the examples that it holds out.

    The evaluation is held to the client's budget, as its turns are.

    Raises:
        BudgetExceeded: it would have held more.
    """
    started = process_time()
    stack = AdapterStack.from_tensors(order.tensors)
    classes = None if stack.head is None else stack.head.linear.out_features
    if not len(held_out):
        blank = () if classes is None else (0,) * classes
        return Metrics(0, 0, 0.0, 0, blank, blank, process_time() - started)
    planned = evaluation_bytes(memory, len(stack.layers), len(order.window), int(held_out.lengths.max()))
    cache = base.scratch / client.name / f"({order.rows})"
    reporter = begin("evaluating")
    with MemoryCap(min(planned, client.budget_bytes), client.budget_bytes) as peak, one_thread():
        predictions = predict_early_exit(held_out, base, cache, stack, order.window, reporter)
    sums = ScoreSums.of(predictions, held_out.labels, classes)
    return Metrics(*sums, process_time() - started, peak.bytes)
