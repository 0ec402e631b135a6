"""Promise: a job asks its sites for their rows, and waits for nobody who will never answer."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import text

from chainfed_ray.activity import no_listener
from chainfed_ray.client.survey import Absence
from chainfed_ray.cluster.database import open_database
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.desk import Desk
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.spec.parse import parse_job
from tests.watching import wait_for

SESSION = 32 * "1"


def test_a_survey_ends_whose_order_was_withdrawn(
    storage: Storage, store: JobStore, document: dict[str, Any], tiny_model_folder: Path
) -> None:
    """Another version of the service gave it, so that no site can read it. The job has no deadline."""
    document["fleet"]["clients"] += [{"name": "clinic", "memory": "64MiB", "site": "far", "data": "site:rows.jsonl"}]
    spec = parse_job(document)
    job = store.submit(spec).id
    store.move(job, "validating")
    engine = open_database(storage.database, existing=True)
    with ThreadPoolExecutor() as executor, closing(Mailbox(storage)) as mailbox:
        survey = executor.submit(Desk(job, storage).survey, spec, tiny_model_folder, no_listener)
        wait_for(lambda: mailbox.waiting({"far"}), "order")
        with engine.begin() as connection:
            connection.execute(text("update site_orders set document = replace(document, 'document', 'spec')"))
        mailbox.join("far", SESSION, "1.0")
        assert mailbox.next("far", SESSION) is None
        try:
            assert survey.result(timeout=20) == {"clinic": Absence("its order was withdrawn")}
        finally:
            store.move(job, "cancelling")  # or a survey that goes on would go on for ever
    engine.dispose()
