"""Asks the processes that answer with models. If one dies, what it had not answered yet is asked anew."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from chainfed_ray.errors import ChainFedError, PartUnavailable, ServiceBusy
from chainfed_ray.serving.messages import Piece

_ATTEMPTS = 3
_RETRY_SECONDS = 5


async def answered(ask: Callable[[], Any]) -> Any:
    """The answer to what ``ask`` asks. It is given up if nobody waits for it any more.

    If the process that would answer dies, another one is asked, or the one that takes its place.

    Raises:
        ServiceBusy: too many requests wait already.
        PartUnavailable: process after process died.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _errors_of_ours():
                answer = ask()
                try:
                    return await answer
                finally:
                    answer.cancel()  # nothing, if it has answered
        except PartUnavailable:
            if attempt == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


async def written(ask: Callable[[], Any]) -> AsyncGenerator[Piece, None]:
    """The pieces of a text, as ``answered``. A text of which a piece was told already is not begun anew."""
    for attempt in range(1, _ATTEMPTS + 1):
        pieces, begun = ask(), False
        try:
            with _errors_of_ours():
                async for piece in pieces:
                    begun = True
                    yield piece
            return
        except PartUnavailable:
            if begun or attempt == _ATTEMPTS:
                raise
        finally:
            pieces.cancel()


@contextmanager
def _errors_of_ours() -> Iterator[None]:
    """Raise what went wrong there as an error of ours. Ray's own message is a whole traceback."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, ChainFedError) else error from None
    except BackPressureError:
        raise ServiceBusy("requests to the models", _RETRY_SECONDS) from None
    except (RayError, RayServeException) as error:
        raise PartUnavailable("the process of the models", f"ended ({type(error).__name__})", _RETRY_SECONDS) from error
