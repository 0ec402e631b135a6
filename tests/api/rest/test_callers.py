"""Promises about callers who go away: nothing goes on for them."""

import asyncio
from typing import Any

import pytest
from fastapi import Request
from starlette.types import Message

from chainfed_ray.api.rest.service import CallerGone, while_connected


def a_request(*messages: Message) -> Request:
    """A request of which these messages come, and then nothing more."""
    left = list(messages)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return Request({"type": "http", "headers": []}, receive)


def test_work_ends_with_its_caller() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def story() -> None:
        with pytest.raises(CallerGone):
            await while_connected(a_request({"type": "http.disconnect"}), work())

    asyncio.run(asyncio.wait_for(story(), 10))
    assert ended


@pytest.mark.parametrize("result", [7, ValueError("no")])
def test_who_stays_has_the_answer(result: Any) -> None:
    async def work() -> Any:
        await asyncio.sleep(0)
        if isinstance(result, Exception):
            raise result
        return result

    async def story() -> Any:
        return await while_connected(a_request(), work())

    if isinstance(result, Exception):
        with pytest.raises(ValueError, match="no"):
            asyncio.run(story())
    else:
        assert asyncio.run(story()) == result


def test_work_ends_with_the_one_who_waits_for_it() -> None:
    ended = []

    async def story() -> None:
        begun = asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        waiting = asyncio.create_task(while_connected(a_request(), work()))
        await begun.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(asyncio.wait_for(story(), 10))
    assert ended
