"""How many jobs there are. The database keeps the numbers (``CountRow``), so they cost the same however many jobs there are."""

from collections import defaultdict
from typing import cast

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import CountRow
from chainfed_ray.cluster.tenants import View
from chainfed_ray.records.states import Status


def counts(engine: Engine, view: View) -> dict[str, dict[Status, int]]:
    """How many jobs each tenant of the ``view`` has in each state. Tenants and states without jobs are missing."""
    query = select(CountRow.tenant, CountRow.status, CountRow.jobs).where(CountRow.jobs > 0).order_by(CountRow.tenant)
    if not view.everything:
        query = query.where(CountRow.tenant == view.tenant)
    found: defaultdict[str, dict[Status, int]] = defaultdict(dict)
    with Session(engine) as session:
        for tenant, status, jobs in session.execute(query):
            found[tenant][cast("Status", status)] = jobs
    return dict(found)
