"""Evaluates a stack on the rows that a client at this site holds out. Sums of scores leave the site, and no prediction."""

from time import process_time

from torch.nn.functional import layer_norm

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.server import evaluation_bytes
from chainfed_ray.chain import Window
from chainfed_ray.client.head_sums import TEMPERATURES, grid_losses
from chainfed_ray.client.messages import CANDIDATE, Calibrating, Client, Evaluating, HeadLosses, Metrics, TurnOrder
from chainfed_ray.client.progress import begin
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.cap import MemoryCap
from chainfed_ray.device.threads import one_thread
from chainfed_ray.evaluation.early_exit import pooled_features, predict_early_exit
from chainfed_ray.evaluation.score import ScoreSums
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.source import ModelSource


def evaluated_by(
    client: Client, base: ModelSource, memory: MemoryProfile, held_out: Examples, order: TurnOrder
) -> Metrics | HeadLosses:
    """What ``client`` sends of the examples that it holds out, as the order says.

    Raises:
        BudgetExceeded: it would have held more than the client's budget.
    """
    if isinstance(order, Calibrating):
        return calibrate(client, base, memory, held_out, order)
    assert isinstance(order, Evaluating), "no other order is about rows that are held out"
    return evaluate(client, base, memory, held_out, order)


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
    cache = base.scratch / client.name / f"({order.rows})"
    reporter = begin("evaluating")
    with _cap(client, memory, stack, order.window, held_out) as peak, one_thread():
        predictions = predict_early_exit(held_out, base, cache, stack, order.window, reporter)
    sums = ScoreSums.of(predictions, held_out.labels, classes)
    return Metrics(*sums, process_time() - started, peak.bytes)


def calibrate(
    client: Client, base: ModelSource, memory: MemoryProfile, held_out: Examples, order: Calibrating
) -> HeadLosses:
    """The losses of the order's classifiers on the examples that ``client`` holds out.

    Raises:
        BudgetExceeded: it would have held more than the client's budget.
    """
    started = process_time()
    count = sum(name.startswith(CANDIDATE) for name in order.tensors) // 2
    parts = order.tensors
    found = [(parts[f"{CANDIDATE}{place}.weight"], parts[f"{CANDIDATE}{place}.bias"]) for place in range(count)]
    stack = AdapterStack.from_tensors(
        {name: tensor for name, tensor in order.tensors.items() if not name.startswith(CANDIDATE)}
    )
    if not len(held_out):
        return HeadLosses(0, ((0.0,) * len(TEMPERATURES),) * len(found), (0,) * len(found), process_time() - started)
    cache = base.scratch / client.name / "(validation)"
    reporter = begin("evaluating")
    with _cap(client, memory, stack, order.window, held_out) as peak, one_thread():
        means, labels = pooled_features(held_out, base, cache, stack, order.window, reporter)
        features = layer_norm(means, means.shape[-1:]).flatten(1)
        losses, correct = zip(*(grid_losses(*candidate, features, labels) for candidate in found), strict=True)
    return HeadLosses(len(held_out), losses, correct, process_time() - started, peak.bytes)


def _cap(client: Client, memory: MemoryProfile, stack: AdapterStack, window: Window, held_out: Examples) -> MemoryCap:
    """An evaluation is held to the client's budget, as its turns are."""
    planned = evaluation_bytes(memory, len(stack.layers), len(window), int(held_out.lengths.max()))
    return MemoryCap(min(planned, client.budget_bytes), client.budget_bytes)
