"""Promise: who changes an alias while another one does has the last word, or the first, and nothing of both is mixed."""

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_some
from typing import Any

import pytest

from chainfed_ray.cluster.jobs.store import JobStore

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
