"""``python -m benchmarks service``: the requests that are in flight are sent, and each is answered before it counts."""

import asyncio

import pytest

from benchmarks.service_callers import main
from chainfed_ray.cluster.jobs.store import JobStore
from tests.apps import an_app, served
from tests.builders import SPEC


@pytest.mark.slow
def test_every_request_is_answered(store: JobStore) -> None:
    job = store.submit(SPEC).id
    with served(an_app(store)) as address:
        requests = ["GET /healthz", f"GET /v1/jobs/{job}", f"POST /v1/jobs/{job}/clone {{}}"]
        with pytest.raises(AssertionError, match="201"):
            asyncio.run(main(address, 3, 1, requests))
        waits = asyncio.run(main(address, 20, 5, requests[:2]))
    assert len(waits) == 20
    assert all(seconds > 0 for seconds in waits)
    assert len(store.page()) == 2, "the body was sent"
