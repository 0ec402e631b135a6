"""What the coordinator of a job has of its sites: their surveys before it begins, and leases for their clients' turns."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import ray
from ray.exceptions import RayError

from chainfed_ray.activity import Activity, Listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.client.messages import Client
from chainfed_ray.client.survey import Absence, Survey, SurveyStopped
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.pool.leases import Lease
from chainfed_ray.cluster.resources import controller_options, runtime_env
from chainfed_ray.cluster.sites.actor import JobForSites, Seen, SitesActor
from chainfed_ray.cluster.sites.mailbox import Mailbox, OrderState
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.hub import digest_of, first_line
from chainfed_ray.problem import some_of
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.wire.codec import job_document, survey_document, survey_of, survey_order
from chainfed_ray.wire.envelope import Done, NotDone
from chainfed_ray.wire.reasons import in_words

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0


class _Lookout:
    """Where the turns of a job's clients at sites are, as its ``actor`` said last. It is not waited for."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._seen: Seen | None = None
        self._asked: Any = None
        self._asked_at = self._seen_at = -_LOOK_SECONDS

    def seen(self, since: float) -> Seen | None:
        """What the actor answered last, if it was asked later than ``since``. It is asked once a second, for all turns."""
        if self._asked is None and monotonic() - self._asked_at >= _LOOK_SECONDS:
            self._asked, self._asked_at = self._actor.look.remote(), monotonic()
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            with suppress(RayError):  # Ray makes the actor again
                self._seen, self._seen_at = ray.get(asked), self._asked_at
        return self._seen if self._seen_at > since else None


@dataclass(eq=False)
class SiteLease(Lease):
    """A turn of one client at a site. It is placed when a process at the site has taken it."""

    client: str = ""
    site: str = ""
    joined: bool = True
    lookout: _Lookout | None = None

    def is_placed(self) -> bool:
        """True once the site is known to have taken the turn."""
        if not self.placed and self.lookout and (seen := self.lookout.seen(self.made_at)):
            self.placed, self.joined = self.client in seen.taken, self.site not in seen.absent
        return self.placed

    def ask(self) -> Any:
        """See ``Lease``."""
        return self.actor.progress.remote(self.client)

    def why_waiting(self) -> str:
        """See ``Lease``."""
        return f"waiting for site {self.site}" + ("" if self.joined else ", which has not joined")

    def end(self) -> None:
        """Take the turn back. The actor stands for other clients as well."""
        self.actor.withdraw.remote(self.client)


class Desk:
    """See ``Sites``; for the job with the id ``job``."""

    def __init__(self, job: str, storage: Storage) -> None:
        self._id, self._storage = job, storage
        self._job: JobForSites | None = None
        self._actor: Any = None
        self._lookout: _Lookout | None = None
        self._awaited: dict[tuple[str, str], str] = {}  # classes of clients, by the site and the id of the order
        self._max_length = 0

    def survey(self, spec: JobSpec, base: Path, listen: Listener) -> Mapping[str, Survey | Absence]:
        """See ``Sites``. It waits for a site as long as for an update: ``rounds.deadline``; without one, until it comes.

        Raises:
            SurveyStopped: the job is to pause or to end, or the service drains.
        """
        self._job = JobForSites(self._id, spec.name, spec.document(), digest_of(base))
        self._max_length = spec.data.max_length
        log = CommitLog(self._storage.job(self._id))
        # A job that resumes has the clients with which it began. One that never began asks again: sites may have joined.
        if log.job_started() and (documents := log.surveys()) is not None:
            found = {name: self._survey_of(document) for name, document in documents.items()}
            with closing(Mailbox(self._storage)) as mailbox:
                self._awaited = self._given(mailbox, spec, _still_to_come(found))
            return found
        with closing(Mailbox(self._storage)) as mailbox:
            found = self._surveyed(mailbox, spec, listen)
        log.commit_surveys({name: _document_of(survey) for name, survey in found.items()})
        return found

    def late(self, besides: Collection[str]) -> Mapping[str, Survey | Absence]:
        """See ``Sites``. A database that does not answer is asked again before the next round."""
        asked = {key: name for key, name in self._awaited.items() if name not in besides}
        if not asked:
            return {}
        try:
            with closing(Mailbox(self._storage)) as mailbox:
                states = mailbox.states(asked)
        except NO_ANSWER:
            return {}
        return {asked[key]: self._answered(state) for key, state in states.items() if state.is_over}

    def planned(self, memory: MemoryProfile) -> None:
        """See ``Sites``."""
        if self._job:
            self._job = replace(self._job, memory=memory)

    def lease(self, client: Client) -> Lease:
        """A lease for one turn of ``client``, which is at a site."""
        assert client.remote is not None, "a client at a site"
        if self._actor is None:
            actor_class: Any = SitesActor  # ray.remote adds `options`, which the type does not show
            options = controller_options() | {"runtime_env": runtime_env()}
            self._actor = actor_class.options(**options).remote(self._job, self._storage)
            self._lookout = _Lookout(self._actor)
        lease = SiteLease(self._actor, client.client_class, 0, None, kept=False)
        lease.client, lease.site, lease.lookout = client.name, client.remote.site, self._lookout
        return lease

    def _given(self, mailbox: Mailbox, spec: JobSpec, classes: Collection[str]) -> dict[tuple[str, str], str]:
        """Give the orders for a survey to the sites of the ``classes`` of clients, and list them by site and id."""
        job, given = self._job, dict[tuple[str, str], str]()
        assert job, "the survey makes it"
        document = mailbox.files.keep_document(job.id, job_document(job.spec)) if classes else None
        for group in spec.fleet.at_sites:
            if document and group.name in classes:
                assert group.site is not None, "a class of clients at a site"
                order = survey_order(job.id, job.name, document, job.base_digest, group.name, group.data or "")
                address = mailbox.address(job.id, group.site)
                mailbox.give(address, order)
                given[address, order.id] = group.name
        return given

    def _surveyed(self, mailbox: Mailbox, spec: JobSpec, listen: Listener) -> dict[str, Survey | Absence]:
        orders = self._given(mailbox, spec, {group.name for group in spec.fleet.at_sites})
        deadline = spec.rounds.deadline
        ends, found, told = monotonic() + deadline, dict[str, Survey | Absence](), ""
        while len(found) < len(orders):
            states = mailbox.states(orders.keys() - {key for key, name in orders.items() if name in found})
            found |= {orders[key]: self._answered(state) for key, state in states.items() if state.is_over}
            missing = sorted(site for (site, _), name in orders.items() if name not in found)
            if missing and monotonic() > ends:
                for name in orders.values():
                    if name not in found:
                        found[name] = Absence(f"it did not answer within {deadline:g} s", may_come=True)
            elif missing:
                if mailbox.wants_to_stop(self._id) or Drain(self._storage.root).has_begun():
                    raise SurveyStopped(f"job {self._id} is about to stop; it waits for its sites no longer")
                joined = {site.name for site in mailbox.sites() if site.joined}
                if (words := _waiting(missing, joined)) != told:
                    listen(
                        Activity(
                            what="asking sites for their rows",
                            done=len(found),
                            total=len(orders),
                            unit="sites",
                            note=words,
                        )
                    )
                    told = words
                sleep(_POLL_SECONDS)
        to_come = _still_to_come(found)
        self._awaited = {key: name for key, name in orders.items() if name in to_come}
        return found

    def _survey_of(self, document: dict[str, Any]) -> Survey | Absence:
        if "absent" in document:
            return Absence(document["absent"], document.get("may_come", False))
        return survey_of(document, self._max_length)

    def _answered(self, state: OrderState) -> Survey | Absence:
        match state.answer:
            case Done() as done:
                try:
                    return survey_of(done.content, self._max_length)
                except ValueError as error:
                    return Absence(f"its answer was refused: {first_line(error)}")
            case NotDone() as answer:
                return Absence(in_words(answer))
            case _:
                return Absence("its order was withdrawn")


def _still_to_come(found: Mapping[str, Survey | Absence]) -> set[str]:
    return {name for name, answer in found.items() if isinstance(answer, Absence) and answer.may_come}


def _waiting(missing: Sequence[str], joined: Collection[str]) -> str:
    """What the survey waits for: sites that work on it, and sites that are not there."""
    busy, absent = ([site for site in missing if (site in joined) is there] for there in (True, False))
    parts = [f"waiting for {some_of(busy)}"] if busy else []
    return "; ".join([*parts, *([f"not joined: {some_of(absent)}"] if absent else [])])


def _document_of(survey: Survey | Absence) -> dict[str, Any]:
    if isinstance(survey, Survey):
        return survey_document(survey)
    return {"absent": survey.reason, "may_come": survey.may_come}
