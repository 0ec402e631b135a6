"""A client's turn of training: it trains the adapters of its window on its own examples."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from chainfed_ray.budget.footprint import SavedActivations
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.entrance import matrix_reader, window_inputs
from chainfed_ray.client.messages import Client, Training, Update
from chainfed_ray.client.objective import (
    LossFunction,
    Objective,
    chain_loss,
    classification_loss,
    language_modeling_loss,
    trained_names,
)
from chainfed_ray.client.progress import begin
from chainfed_ray.data.tokens import Batch, Examples, of_like_length
from chainfed_ray.model.adapters import AdapterStack, Tensors, of_ranks
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import through_window
from chainfed_ray.model.pooling import LayerStates, padded_together
from chainfed_ray.model.prefix import Activations
from chainfed_ray.seeds import derive
from chainfed_ray.streaming.activations import OffloadedActivations, overwrite_activations
from chainfed_ray.streaming.matrices import SliceReader


def train(client: Client, blocks: Blocks, scratch: Path, order: Training) -> Update:
    """Train the window of the client's plan with AdamW, and give the update.

    Training starts from the output of the highest layer that is below every trained adapter: the window's bottom layer, or the
    one below it if adapters are inside their layers. No backward pass goes through it, and with a prefix cache it runs once. If
    the order's exit is above the window, the window's output goes on through the layers in between, and the gradient comes back
    through them. Of LoRAs the plan may train the first ranks alone; the others compute along. An optimizer step sees
    ``order.batch_size`` examples, in micro-batches whose gradients add up to the batch's.

    Raises:
        BudgetExceeded: the turn is capped, and would have held more than its cap (``take_turn``).
    """
    started, cpu_started = perf_counter(), process_time()
    examples, plan = client.examples, client.plan
    names = trained_names(order.tensors, plan.window, order.global_weight, order.global_trains)
    whole = {name: order.tensors[name] for name in names}
    if plan.rank is not None:
        order = replace(order, tensors=order.tensors | of_ranks(whole, slice(plan.rank)))
    # Only tensors that are trained are copied. The others are used as the order brought them, to save memory.
    stack = AdapterStack.from_tensors(
        {
            name: tensor.clone(memory_format=torch.contiguous_format) if name in names else tensor
            for name, tensor in order.tensors.items()
        }
    )
    if plan.rank is not None:
        _keep_further_ranks(stack, plan.window, of_ranks(whole, slice(plan.rank, None)))
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(name in names)
    window = Window(plan.window.bottom, order.exit)
    run = Window(stack.below(window.bottom), order.exit)
    with ExitStack() as resources:
        matrices = resources.enter_context(matrix_reader(blocks, plan))
        activations = window_inputs(client, blocks, scratch, stack, matrices, order.window)
        begin("loading the window")
        streamed = matrices if plan.weights == "streamed" else None
        layers = {layer: blocks.load_layer(layer, streamed) for layer in list(run)[1:]}
        if plan.activations == "offloaded":
            for layer in layers.values():
                overwrite_activations(layer)
        offload = resources.enter_context(_offload(scratch, plan))
        step = _Step(blocks, stack, layers, activations, matrices, offload, plan.activations, window, run, order)
        loss, steps = _train(step, examples, plan.micro_batch, order)
    tensors = {name: parameter.detach() for name, parameter in stack.named_parameters() if name in names}
    if client.privacy:
        begin("clipping the update and adding noise" if client.privacy.noise else "clipping the update")
        of_stage = trained_names(order.tensors, order.window, order.global_weight, order.global_trains)
        sent = of_stage if client.privacy.noise else tensors
        tensors = client.privacy.applied({name: order.tensors[name] for name in sorted(sent)}, tensors)
    seconds = (perf_counter() - started) / client.speed
    return Update(tensors, len(examples), loss, steps, seconds, process_time() - cpu_started)


def _keep_further_ranks(stack: AdapterStack, window: Window, further: Tensors) -> None:
    """Let the LoRAs of ``window`` compute with their ``further`` ranks, which are not trained."""
    for layer in window:
        for path, part in stack.inside(layer).items():
            first, second = (further[f"adapters.{layer}.{path}.{name}.weight"] for name in ("lora_A", "lora_B"))
            part.further = first, second


def _train(step: "_Step", examples: Examples, micro_batch: int, order: Training) -> tuple[float, int]:
    """Make every optimizer step; the mean loss over the examples seen, in nats, and the number of steps."""
    optimizer = _AdamW(step.stack, order)
    total_loss, seen, steps = 0.0, 0, 0
    batches = step_batches(len(examples), order)
    for batch in begin("training").each(batches, _steps(len(examples), order), "steps"):
        for indices in examples.by_length(micro_batch, batch):
            total_loss += step.backward(examples, indices, len(batch))
        if order.proximal:
            _add_proximal_gradients(step.stack, order)
        if order.clip_norm is not None:
            trained = [parameter for parameter in step.stack.parameters() if parameter.grad is not None]
            # foreach would make temporary copies of all gradients at once.
            nn.utils.clip_grad_norm_(trained, order.clip_norm, foreach=False)
        optimizer.step()
        optimizer.forget_gradients()
        seen += len(batch)
        steps += 1
    return total_loss / seen, steps


def _add_proximal_gradients(stack: AdapterStack, order: Training) -> None:
    """Add the gradients of μ/2 · |w − w_start|² (FedProx, Li et al., 2020, equation 2); w_start is the order's own tensors.

    Only one tensor's difference is held at a time. That is less than the AdamW step holds besides its state, so the plan
    need not count it.
    """
    for name, parameter in stack.named_parameters():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - order.tensors[name], alpha=order.proximal)


def step_batches(count: int, order: Training) -> Iterator[np.ndarray]:
    """The indices of each optimizer step's examples, out of ``count``, shuffled anew in each epoch."""
    steps_per_epoch = math.ceil(count / order.batch_size)
    for step in range(_steps(count, order)):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            places = shuffled(count, derive(order.seed, "epoch", epoch))
        yield places[place * order.batch_size : (place + 1) * order.batch_size]


def _steps(count: int, order: Training) -> int:
    """The optimizer steps of a turn on ``count`` examples."""
    return order.steps if order.steps is not None else order.epochs * math.ceil(count / order.batch_size)


@dataclass(frozen=True)
class _Step:
    """The forward and backward pass of a micro-batch, with all that the micro-batches of a turn have in common."""

    blocks: Blocks
    stack: AdapterStack
    layers: dict[int, nn.Module]
    activations: Activations
    matrices: SliceReader | None
    saving: AbstractContextManager[None]
    saved: SavedActivations
    window: Window  # the trained layers and, with an exact look-ahead, those above
    run: Window  # the layers that a step runs, and the one below them, whose output enters
    order: Training

    def backward(self, examples: Examples, indices: np.ndarray, batch_size: int) -> float:
        """Add a micro-batch's share of the gradients of a batch; give its loss, summed over its examples.

        The examples at ``indices`` have ascending lengths.
        """
        batch = examples.batch(indices)
        with self.saving:
            states = self._output(indices, examples.lengths[indices], batch.mask)
            loss = self._objective(self.stack, self.window, states, batch.mask, self._loss(batch))
            del states
        (loss / batch_size).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _output(self, indices: np.ndarray, lengths: np.ndarray, mask: Tensor) -> LayerStates:
        """The window's output. Through its layers examples of like length run together, with little padding."""
        whole = [slice(0, len(indices))]
        parts = [
            through_window(
                self.blocks,
                self.stack,
                self.run,
                self.layers,
                self.activations.batch(indices[part]),
                mask[part, : lengths[part].max()],
                recompute=self.saved == "recomputed",
            )
            for part in (of_like_length(lengths) if self.layers else whole)
        ]
        return parts[0] if len(parts) == 1 else padded_together(parts)

    @property
    def _objective(self) -> Objective:
        order = self.order
        follows = order.global_trains != "window"
        own = partial(chain_loss, global_weight=order.global_weight, head_follows_global=follows)
        return order.objective or own

    def _loss(self, batch: Batch) -> LossFunction:
        if self.stack.head is not None:
            return classification_loss(self.stack.head, batch.mask, batch.labels)
        assert self.matrices is not None, "a language model's head is streamed"
        assert batch.targets is not None, "a language model's examples have targets"
        return language_modeling_loss(self.blocks, batch.ids.numpy(), batch.mask, batch.targets, self.matrices)


@contextmanager
def _offload(scratch: Path, plan: TurnPlan) -> Iterator[AbstractContextManager[None]]:
    """A context in which autograd saves activations as the plan says: in memory, or offloaded to a file in ``scratch``."""
    if plan.activations != "offloaded":
        yield nullcontext()
        return
    offload = OffloadedActivations(scratch)
    try:
        yield offload
    finally:
        offload.close()


class _AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with torch's defaults and no weight decay.

    The step is that of ``torch.optim.AdamW``, bit for bit. An object of that class would load torch's compiler at its first
    step, which takes 70 MiB and is not used.
    """

    def __init__(self, stack: AdapterStack, order: Training) -> None:
        adapters = [parameter for parameter in stack.adapters.parameters() if parameter.requires_grad]
        self._groups = [(adapters, order.learning_rate)]
        if stack.head is not None:
            self._groups.append((list(stack.head.parameters()), order.head_learning_rate))
        # Steps, and both moments, of each parameter.
        self._states: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for parameters, rate in self._groups:
            trained = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
            for parameter in trained:
                if parameter not in self._states:
                    zeros = (torch.zeros_like(parameter), torch.zeros_like(parameter))
                    self._states[parameter] = (torch.tensor(0.0), *zeros)
            states = [self._states[parameter] for parameter in trained]
            with torch.no_grad():
                adamw(
                    list(trained),
                    list(trained.values()),
                    [first for _, first, _ in states],
                    [second for _, _, second in states],
                    [],
                    [steps for steps, _, _ in states],
                    foreach=False,  # it would make temporary copies of all parameters at once
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=rate,
                    weight_decay=0.0,
                    eps=1e-8,
                    maximize=False,
                )

    def forget_gradients(self) -> None:
        """Free the gradients of the step that was made."""
        for parameters, _ in self._groups:
            for parameter in parameters:
                parameter.grad = None


def shuffled(count: int, seed: int) -> np.ndarray:
    """The indices of ``count`` examples, in a random order that follows from ``seed``."""
    return np.random.default_rng(seed).permutation(count)
