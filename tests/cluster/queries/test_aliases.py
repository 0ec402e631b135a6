"""Promise: who changes an alias while another one does has the last word, or the first, and nothing of both is mixed."""

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_some
from contextlib import closing
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import create_engine, insert, text

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import AliasRow
from chainfed_ray.errors import LimitReached
from tests.watching import wait_for

_AT_ONCE = 0.2  # seconds, in which the other one would be done if nothing held it up


@pytest.mark.parametrize("other", ["delete", "set"])
def test_an_alias_that_returns_meanwhile_is_waited_for(store: JobStore, other: str) -> None:
    aliases = store.aliases
    aliases.set("support", {"tiny:old": 1.0})
    aliases.set("support", {"tiny:new": 1.0})
    begun = list[Future[Any]]()

    def is_served(_: str) -> bool:
        begun.append(
            threads.submit(aliases.delete, "support")
            if other == "delete"
            else threads.submit(aliases.set, "support", {"tiny:newest": 1.0})
        )
        wait_for_some(begun, _AT_ONCE)
        return True

    with ThreadPoolExecutor(1) as threads:
        assert aliases.roll_back("support", is_served) == {"tiny:old": 1.0}
    assert begun[0].result() == (True if other == "delete" else None)
    assert aliases.get("support") == (None if other == "delete" else {"tiny:newest": 1.0})
    assert not aliases.delete("support") or other == "set"


@pytest.mark.slow
@pytest.mark.parametrize("tenant", ["default", "alice"])
def test_who_make_aliases_at_once_make_no_more_than_may_be(database: str, tenant: str) -> None:
    with closing(JobStore(database)) as store:
        store.seen_by("other", everything=False).aliases.set("x", {"tiny:old": 1.0})
    begin = Barrier(6)

    def make(number: int) -> int:
        refused = 0
        with closing(JobStore(database)) as store:
            aliases = store.seen_by(tenant, everything=False).aliases
            begin.wait(60)
            for index in range(4):
                try:
                    aliases.set(f"name-{(number + index) % 8}", {"tiny:old": 1.0}, most=5)
                except LimitReached as error:
                    refused += error.what == "5 aliases"
        return refused

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(make, range(6))) > 0
    with closing(JobStore(database)) as store:
        assert len(store.seen_by(tenant, everything=False).aliases.all()) == 5
        assert len(store.seen_by("other", everything=False).aliases.all()) == 1


@pytest.mark.slow
def test_an_alias_that_a_process_of_the_version_before_makes_at_the_same_moment_is_changed(
    empty_postgresql: str,
) -> None:
    """During a rolling upgrade: that version takes no lock before it adds an alias."""
    with closing(JobStore(empty_postgresql)) as store, ThreadPoolExecutor(1) as threads:
        engine = create_engine(empty_postgresql)
        with engine.connect() as other, engine.connect() as watching:
            other.execute(insert(AliasRow).values(name="support", targets=[{"tiny:old": 1.0}]))
            ours = threads.submit(store.aliases.set, "support", {"tiny:new": 1.0}, most=1)
            waits = text("select count(*) from pg_locks where not granted")
            wait_for(lambda: watching.scalar(waits), "process that waits for the other")
            other.commit()
            ours.result(60)
        engine.dispose()
        assert store.aliases.get("support") == {"tiny:new": 1.0}
        assert store.aliases.roll_back("support", lambda _: True) == {"tiny:old": 1.0}
