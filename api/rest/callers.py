"""Ends the work for callers who go away."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

Result = TypeVar("Result")


class CallerGone(Exception):
    """The caller has closed the connection, so nobody waits for the answer."""


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Do ``work``, and cancel it if the caller goes away. The request's body must have been read.

    Raises:
        CallerGone: the caller has gone.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))  # until it has let go of what it holds


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
