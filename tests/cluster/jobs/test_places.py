"""Promise of the places for checks and dry runs: a tenant that takes all it may leaves some to others."""

import asyncio
from typing import Any

import pytest

from chainfed_ray.cluster.jobs.checking import Checkers
from chainfed_ray.cluster.jobs.preflight import Limits, Preflight
from chainfed_ray.errors import ServiceBusy
from tests.builders import SPEC


def test_a_tenant_leaves_places_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        begun, done = list[str](), asyncio.Event()

        async def slow(*_: Any) -> list[Any]:
            begun.append("one")
            await done.wait()
            return []

        monkeypatch.setattr(Checkers, "check", slow)
        limits, preflight = Limits(), Preflight(4)
        most = limits.at_once_of_tenant + limits.waiting_of_tenant

        def asked(tenant: str) -> asyncio.Task[None]:
            return asyncio.create_task(preflight.check(SPEC, tenant=tenant))

        of_alice = [asked("alice") for _ in range(most + 1)]
        (refused,), waiting = await asyncio.wait(of_alice, return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(refused.exception(), ServiceBusy)
        assert "dry runs of one tenant at once; try again in 10 s" in str(refused.exception())
        of_bob = asked("bob")
        async with asyncio.timeout(60):
            while len(begun) == limits.at_once_of_tenant:
                await asyncio.sleep(0)
        done.set()
        await asyncio.gather(of_bob, *waiting)
        assert len(begun) == most + 1

    asyncio.run(story())
