"""Asks the processes that answer with models. If one dies, what it had not answered yet is asked anew."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from time import monotonic
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from chainfed_ray.errors import ChainFedError, PartUnavailable, ServiceBusy
from chainfed_ray.serving.messages import Piece, Question

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_RETRY_SECONDS = 5
_MOST_WAITING = 256  # questions of a process of the API that wait for their call
_FEW_TEXTS = 16  # a question with more has a call of its own, so that no other waits for it here
_TEXTS = 128  # of the questions of one call
_PATIENCE = 0.05  # seconds for which questions wait for a call; one that takes longer may be loading a model
_CHECK_SECONDS = 10.0  # for such a check; Serve's controller may be starting again
_LOOK_SECONDS = 1.0  # between checks whether a process will ever answer those who wait
Check = Callable[[], Coroutine[Any, Any, None]]
"""Raises an error if no process can answer, and none will."""
_Waiting = tuple[Question, "asyncio.Future[Any]"]


def shared(check: Check) -> Check:
    """``check`` for all who wait: one at a time, and at most one a second."""
    looking: asyncio.Future[None] | None = None
    begun = 0.0

    async def looked() -> None:
        nonlocal looking, begun
        if looking is None or (looking.done() and monotonic() - begun >= _LOOK_SECONDS):
            looking, begun = asyncio.ensure_future(check()), monotonic()
        await asyncio.shield(looking)  # who leaves does not end it for others

    return looked


async def answered(ask: Callable[[], Any], check: Check | None = None) -> Any:
    """The answer to what ``ask`` asks. It is given up if nobody waits for it any more, or ``check`` raises an error meanwhile.

    If the process that would answer dies, another one is asked, or the one that takes its place.

    Raises:
        ServiceBusy: too many requests wait already.
        PartUnavailable: process after process died, or none can start.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _errors_of_ours():
                answer = ask()
                try:
                    return await _looked_after(answer, check)
                finally:
                    answer.cancel()  # nothing, if it has answered
        except PartUnavailable:
            if attempt == _ATTEMPTS:
                raise
            if check:
                await _looked(check)
    raise AssertionError("the last attempt returns or raises")


async def _looked_after(awaited: Awaitable[Any], check: Check | None) -> Any:
    """What is ``awaited``, unless ``check`` says meanwhile that nobody will answer. A check that itself fails says nothing."""
    if check is None:
        return await awaited
    work = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait([work], timeout=_LOOK_SECONDS))[0]:
            looking = asyncio.ensure_future(_looked(check))
            try:
                await asyncio.wait([work, looking], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    looking.result()
            finally:
                looking.cancel()
        return work.result()
    finally:
        work.cancel()


async def _looked(check: Check) -> None:
    """Raise what ``check`` says of processes that will not answer. A check that itself fails, or hangs, says nothing."""
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            await check()
    except PartUnavailable:
        raise
    except Exception as error:
        _log.warning("nobody could say whether a model's process starts", exc_info=error)


async def written(ask: Callable[[], Any], check: Check | None = None) -> AsyncGenerator[Piece, None]:
    """The pieces of a text, as ``answered``. A text of which a piece was told already is not begun anew."""
    for attempt in range(1, _ATTEMPTS + 1):
        pieces, begun = ask(), False
        try:
            with _errors_of_ours():
                left = aiter(pieces)
                while (piece := await _looked_after(anext(left, None), None if begun else check)) is not None:
                    begun = True
                    yield piece
            return
        except PartUnavailable:
            if begun or attempt == _ATTEMPTS:
                raise
            if check:
                await _looked(check)
        finally:
            pieces.cancel()


class Together:
    """Asks questions that come while a call is under way in the next one, together: a call costs more than a question.

    They do not wait for a call that takes long, and a question that comes alone waits for nobody. ``ask`` begins a call, whose
    answer is the answer to each question, or its error. Unless questions ``may_wait``, each has a call of its own. All calls
    come from one event loop. For ``check`` see ``answered``.
    """

    def __init__(self, ask: Callable[[list[Question]], Any], may_wait: bool = True, check: Check | None = None) -> None:
        self._ask, self._may_wait, self._check = ask, may_wait, check
        self._waiting = deque[_Waiting]()
        self._calling: asyncio.Task[None] | None = None
        self._calls = set[asyncio.Task[None]]()  # an event loop alone would not keep them

    async def answer(self, question: Question) -> Any:
        """The answer to a question. It is given up if nobody waits for it any more.

        Raises:
            ServiceBusy: too many questions wait already.
            PartUnavailable: process after process died.
        """
        if not self._may_wait or len(question.texts) > _FEW_TEXTS:
            (found,) = await answered(lambda: self._ask([question]), self._check)
            if isinstance(found, Exception):
                raise found
            return found
        if sum(not answer.done() for _, answer in self._waiting) >= _MOST_WAITING:
            raise ServiceBusy("requests to the models", _RETRY_SECONDS)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._calling is None or self._calling.done():
            # In a context of its own: Ray Serve would take what follows for a part of this caller's request.
            self._calling = asyncio.create_task(self._call_while_any_wait(), context=Context())
        return await answer

    async def _call_while_any_wait(self) -> None:
        while taken := self._take():
            call = asyncio.create_task(self._call(taken))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            await asyncio.wait([call], timeout=_PATIENCE)

    def _take(self) -> list[_Waiting]:
        """What waits, as much of it as one call takes, without what nobody waits for any more."""
        taken, texts = list[_Waiting](), 0
        while self._waiting and texts + len(self._waiting[0][0].texts) <= _TEXTS:
            question, answer = self._waiting.popleft()
            if not answer.done():
                taken.append((question, answer))
                texts += len(question.texts)
        return taken

    async def _call(self, taken: list[_Waiting]) -> None:
        questions = [question for question, _ in taken]
        call = asyncio.ensure_future(answered(lambda: self._ask(questions), self._check))

        def give_up_if_all_left(_: object) -> None:
            if all(answer.cancelled() for _, answer in taken):
                call.cancel()

        for _, answer in taken:
            answer.add_done_callback(give_up_if_all_left)
        await asyncio.wait([call])
        if call.cancelled():  # all its callers have left
            return
        error = call.exception()
        found = [error] * len(taken) if error else call.result()
        for (_, answer), result in zip(taken, found, strict=True):
            if answer.done():  # its caller has left
                continue
            if isinstance(result, BaseException):
                answer.set_exception(result)
            else:
                answer.set_result(result)


@contextmanager
def _errors_of_ours() -> Iterator[None]:
    """Raise what went wrong there as an error of ours. Ray's own message is a whole traceback.

    A question that Ray gives up looks as if its caller had left. That is so only if the caller's task is being cancelled.
    """
    try:
        yield
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) and task.cancelling():
            raise
        raise PartUnavailable("the process of the models", "gave it up", _RETRY_SECONDS) from None
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, ChainFedError) else error from None
    except BackPressureError:
        raise ServiceBusy("requests to the models", _RETRY_SECONDS) from None
    except (RayError, RayServeException) as error:
        raise PartUnavailable("the process of the models", f"ended ({type(error).__name__})", _RETRY_SECONDS) from error
