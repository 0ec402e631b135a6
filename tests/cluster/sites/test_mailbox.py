"""Orders and answers, whoever dies: each order is carried out by one process, and each answer counts once."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
import torch
from sqlalchemy import text

from chainfed_ray.cluster.database import open_database
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.mailbox import Mailbox, site_address
from chainfed_ray.cluster.sites.order_feed import OrderFeed
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import AnswerRefused, OrderWithdrawn, SiteSuperseded
from chainfed_ray.wire.codec import survey_order, write_tensors
from chainfed_ray.wire.envelope import Done, HashedFile, Heartbeat, JobDocument, NotDone, Order
from tests.builders import SPEC

FIRST, SECOND = 32 * "1", 32 * "2"
DONE = Done(content={"loss": 0.5})


@pytest.fixture
def mailbox(storage: Storage, store: JobStore) -> Iterator[Mailbox]:
    made = Mailbox(storage)
    made.join("a", FIRST, "1.0")
    yield made
    made.close()


def an_order(data: str = "site:rows.jsonl", most_bytes: int = 10_000, job: str = "job") -> Order:
    order = survey_order(job, "tiny", JobDocument(spec={}).described(), 64 * "0", "silo", data)
    return order.model_copy(update={"most_bytes": most_bytes})


def state(mailbox: Mailbox, order: Order) -> str:
    return mailbox.states({("a", order.id)})["a", order.id].state


def test_an_order_is_taken_once_and_answered_once(mailbox: Mailbox) -> None:
    order = an_order()
    mailbox.give("a", order)
    mailbox.give("a", order)
    assert mailbox.waiting(["a", "b"]) == {"a"}
    assert mailbox.next("a", FIRST) == order
    assert mailbox.next("a", FIRST, [order.id]) is None
    mailbox.answer("a", order.id, FIRST, DONE)
    mailbox.answer("a", order.id, FIRST, DONE)
    with pytest.raises(OrderWithdrawn):
        mailbox.answer("a", order.id, FIRST, Done(content={"loss": 0.1}))
    mailbox.give("a", order)
    assert mailbox.states({("a", order.id)})["a", order.id].answer == DONE


def test_an_order_whose_answer_got_lost_on_its_way_is_given_again(mailbox: Mailbox) -> None:
    mailbox.give("a", an_order())
    assert mailbox.next("a", FIRST) == mailbox.next("a", FIRST) == an_order()


@pytest.mark.parametrize("what", ["withdrawn", "another process"])
def test_an_order_that_is_taken_away_while_its_answer_is_kept_stays_so(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """To keep an answer's tensors takes a while, with an object store."""
    order = an_order()
    mailbox.give("a", order)
    mailbox.next("a", FIRST)

    def keep(*_: object) -> bool:
        mailbox.withdraw("a", order.id) if what == "withdrawn" else mailbox.join("a", SECOND, "1.0")
        return True

    monkeypatch.setattr(mailbox.files, "keep_answer", keep)
    described = HashedFile(size=1, sha256=64 * "0")
    with pytest.raises(OrderWithdrawn):
        mailbox.answer("a", order.id, FIRST, Done(content={}, tensors=described))
    assert state(mailbox, order) == ("withdrawn" if what == "withdrawn" else "waiting")


def test_an_order_that_failed_is_given_again(mailbox: Mailbox) -> None:
    order = an_order()
    mailbox.give("a", order)
    mailbox.next("a", FIRST)
    mailbox.answer("a", order.id, FIRST, NotDone(reason="error"))
    mailbox.give("a", order)
    assert state(mailbox, order) == "waiting"


def test_a_process_that_joins_takes_over_what_another_had_taken(mailbox: Mailbox) -> None:
    order = an_order()
    mailbox.give("a", order)
    mailbox.next("a", FIRST)
    mailbox.join("a", SECOND, "1.0")
    with pytest.raises(SiteSuperseded):
        mailbox.next("a", FIRST)
    with pytest.raises(OrderWithdrawn):
        mailbox.answer("a", order.id, FIRST, DONE)
    assert mailbox.next("a", SECOND) == order
    mailbox.leave("a", SECOND)
    assert state(mailbox, order) == "waiting"
    assert [site.joined for site in mailbox.sites()] == [False]


def test_another_site_reaches_nothing(mailbox: Mailbox) -> None:
    order = an_order()
    mailbox.give("a", order)
    mailbox.next("a", FIRST)
    mailbox.join("b", SECOND, "1.0")
    assert mailbox.next("b", SECOND) is None
    beat = Heartbeat(session=SECOND, doing="training", worked=1.0)
    for request in (
        lambda: mailbox.answer("b", order.id, SECOND, DONE),
        lambda: mailbox.heartbeat("b", order.id, beat),
        lambda: mailbox.tensors_of("b", order.id),
        lambda: mailbox.received("b", order.id),
        lambda: mailbox.receive("b", order.id, SECOND, 0, b"x"),
    ):
        with pytest.raises(OrderWithdrawn):
            request()


def test_a_site_hears_nothing_of_jobs_of_other_tenants(mailbox: Mailbox, store: JobStore) -> None:
    jobs = [store.seen_by(tenant, everything=False).submit(SPEC).id for tenant in ("alice", "bob")]
    of_alice, of_bob = (site_address(tenant, "a") for tenant in ("alice", "bob"))
    unknown = "unknown"
    for job, site in zip(jobs, (of_alice, of_bob), strict=True):
        mailbox.give(site, an_order(job=job))
    assert mailbox.over(of_alice, [*jobs, unknown]) == tuple(sorted([jobs[1], unknown]))
    assert mailbox.over("a", jobs) == tuple(sorted(jobs))

    async def waited() -> float:
        started = monotonic()
        await OrderFeed(mailbox).wait(of_alice, FIRST, [jobs[1]], 30.0)
        return monotonic() - started

    mailbox.join(of_alice, FIRST, "1.0")
    mailbox.withdraw(of_alice, an_order(job=jobs[0]).id)  # so that no order ends the wait
    assert asyncio.run(waited()) < 20, "as with a job that never was"


def test_a_job_that_is_over_takes_its_orders_and_files_with_it(
    mailbox: Mailbox, storage: Storage, store: JobStore
) -> None:
    job = store.submit(SPEC).id
    order = an_order(job=job)
    mailbox.give("a", order)
    mailbox.next("a", FIRST)
    mailbox.receive("a", order.id, FIRST, 0, b"piece")
    assert mailbox.over("a", [job, "another"]) == ("another",)
    mailbox.forget(job)
    assert mailbox.over("a", [job]) == (job,)
    assert not (storage.job(job) / "sites").exists()
    with pytest.raises(OrderWithdrawn):
        mailbox.heartbeat("a", order.id, Heartbeat(session=FIRST, doing="training", worked=1.0))


def test_an_order_of_a_version_before_is_taken_back(mailbox: Mailbox, storage: Storage) -> None:
    mailbox.give("a", old := an_order())
    engine = open_database(storage.database, existing=True)
    with engine.begin() as connection:
        connection.execute(text("update site_orders set document = replace(document, 'document', 'spec')"))
    mailbox.give("a", new := an_order("site:others.jsonl"))
    assert [mailbox.next("a", FIRST), mailbox.next("a", FIRST)] == [None, new]
    assert state(mailbox, old) == "withdrawn"
    assert mailbox.states({("a", old.id)})["a", old.id].is_over, "nobody waits for its answer"
    engine.dispose()


@pytest.mark.parametrize("what", ["an order", "another process", "its job is over"])
def test_who_waits_for_an_order_hears_at_once_of_what_matters(mailbox: Mailbox, store: JobStore, what: str) -> None:
    job = store.submit(SPEC).id
    mailbox.give("a", order := an_order(job=job))
    mailbox.next("a", FIRST)
    mailbox.answer("a", order.id, FIRST, DONE)

    async def waited() -> float:
        feed, started = OrderFeed(mailbox), monotonic()
        waits = [asyncio.create_task(feed.wait("a", FIRST, [job], 30.0)) for _ in range(2)]
        other = asyncio.create_task(feed.wait("b", SECOND, [], 0.5))
        if what == "an order":
            mailbox.give("a", an_order("site:others.jsonl", job=job))
        elif what == "another process":
            mailbox.join("a", SECOND, "1.0")
        else:
            mailbox.forget(job)
        await asyncio.gather(*waits, other)
        return monotonic() - started

    mailbox.join("b", SECOND, "1.0")
    assert asyncio.run(waited()) < 20


def test_tensors_arrive_in_pieces_that_go_on_where_they_stopped(mailbox: Mailbox, tmp_path: Path) -> None:
    order = an_order()
    mailbox.give("a", order)
    mailbox.next("a", FIRST)
    write_tensors({"a": torch.arange(100.0)}, tmp_path / "sent")
    sent, described = (tmp_path / "sent").read_bytes(), HashedFile.of(tmp_path / "sent")
    assert mailbox.receive("a", order.id, FIRST, 0, sent[:100]) == 100
    assert mailbox.receive("a", order.id, FIRST, 0, sent[:100]) == 100, "a piece that comes twice counts once"
    assert mailbox.receive("a", order.id, FIRST, 300, sent[300:]) == 100, "a piece too early is not kept"
    with pytest.raises(AnswerRefused, match="not those that it describes"):
        mailbox.answer("a", order.id, FIRST, Done(content={}, tensors=described))
    assert mailbox.received("a", order.id) == 0, "what is wrong is sent anew"
    mailbox.receive("a", order.id, FIRST, 0, sent)
    mailbox.answer("a", order.id, FIRST, Done(content={}, tensors=described))
    assert mailbox.files.answer("job", order.id).read_bytes() == sent


def test_more_bytes_than_an_order_allows_are_refused(mailbox: Mailbox) -> None:
    order = an_order(most_bytes=10)
    mailbox.give("a", order)
    mailbox.next("a", FIRST)
    with pytest.raises(AnswerRefused, match="more than 10 bytes"):
        mailbox.receive("a", order.id, FIRST, 0, bytes(11))
    with pytest.raises(AnswerRefused):
        mailbox.receive("a", order.id, FIRST, 2**40, b"x")


def test_the_turns_of_a_round_before_are_forgotten(mailbox: Mailbox) -> None:
    old, new = (
        an_order(data).model_copy(update={"tensors": HashedFile(sha256=64 * digit, size=1)})
        for data, digit in (("site:a", "1"), ("site:b", "2"))
    )
    survey = an_order()
    for order in (survey, old, new):
        mailbox.give("a", order)
    mailbox.forget_others("job", 64 * "2")
    assert mailbox.states({("a", one.id) for one in (survey, old, new)}).keys() == {("a", survey.id), ("a", new.id)}
