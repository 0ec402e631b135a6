"""Writes the model cards of a finished job's stacks, beside their weights."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from chainfed_ray.errors import ChainFedError
from chainfed_ray.export.model_card import model_card
from chainfed_ray.export.training_card import licence_of, training_card
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.rounds import JobStarted, Round
from chainfed_ray.spec.job import JobSpec

_CARD = "README.md"
_log = logging.getLogger(__name__)


def write_cards(stacks: Iterable[Path], spec: JobSpec, job_started: JobStarted, rounds: Sequence[Round]) -> None:
    """Write the card of each of a job's ``stacks`` whose folder is there. A job without a card is still done.

    Raises:
        OSError: the disk does not take it.
    """
    licence = licence_of(spec.model.base)
    for stack in stacks:
        if not stack.exists():
            continue
        try:
            saved = load_stack(stack)
            text = model_card(saved, "peft", stack, licence, training_card(spec, job_started, rounds, saved, licence))
        except ChainFedError as error:
            _log.warning("the stack %s has no model card: %s", stack, error)
            continue
        partial = stack / f"{_CARD}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(stack / _CARD)
