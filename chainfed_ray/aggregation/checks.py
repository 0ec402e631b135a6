"""What an update must be to be averaged, what a client may claim of its turn, and what a rule of the caller's may give."""

import reprlib
from collections.abc import Mapping

import torch
from torch import Tensor

from chainfed_ray.errors import InvalidJob, InvalidUpdate

_MOST_CLAIMED = 2**60  # seconds, steps or bytes


def check_update(client: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], examples: int) -> None:
    """Refuse an update that must not be averaged. ``expected`` has the names, shapes and dtypes that the client must send.

    Raises:
        InvalidUpdate: a name, a shape or a dtype is not the expected one, a value is not finite, or no example was used.
    """
    if examples < 1:
        raise InvalidUpdate(client, f"its weight is {examples} examples")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InvalidUpdate(client, f"{missing[0]} is missing")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise InvalidUpdate(client, f"{unknown[0]} was not to be trained")
    for name, wanted in expected.items():
        found = tensors[name]
        if type(found) is not Tensor or found.requires_grad:
            raise InvalidUpdate(client, f"{name} is a {type(found).__name__}, not a plain tensor")
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise InvalidUpdate(
                client, f"{name} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
            )
        if not torch.isfinite(found).all():
            raise InvalidUpdate(client, f"{name} is not finite")


def is_spent(cpu_seconds: object, peak_bytes: object) -> bool:
    """True if these can be what a turn took. Not every kernel measures ``peak_bytes``, so it may be None."""
    try:
        check_claims("", peak_bytes, cpu_seconds=cpu_seconds)
    except InvalidUpdate:
        return False
    return True


def check_claims(client: str, peak_bytes: object, **claims: object) -> None:
    """Refuse an update whose reported numbers, the ``claims``, are negative, no numbers or so large that none can be true.

    Sums of claims are on record, so each must be finite by far. ``peak_bytes`` may be None: not every kernel measures it.

    Raises:
        InvalidUpdate: a claim is something else; it names the claim.
    """
    if peak_bytes is not None:
        claims["peak_bytes"] = peak_bytes
    for what, value in claims.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < _MOST_CLAIMED:  # type: ignore[operator]
            raise InvalidUpdate(client, f"its {what} is {reprlib.repr(value)}")


def check_aggregate(rule: str, aggregate: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Refuse the aggregate of the caller's own rule if the ``trained`` tensors cannot be replaced by it.

    Raises:
        InvalidJob: a name, a shape or a dtype is not that of a ``trained`` tensor, or a value is not finite.
    """
    for name, found in aggregate.items():
        wanted = trained.get(name)
        if wanted is None:
            raise InvalidJob.at("aggregation", rule, f"a rule that gives tensors of the window only; it gave {name}")
        if found.shape != wanted.shape or found.dtype != wanted.dtype or not torch.isfinite(found).all():
            expected = f"a rule that gives {name} as finite {wanted.dtype} {list(wanted.shape)}"
            raise InvalidJob.at("aggregation", rule, f"{expected}; it gave {found.dtype} {list(found.shape)}")
