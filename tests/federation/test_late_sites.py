"""Promises of sites that come after their job has begun: they take part from the next round on, and a resumed job knows."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.activity import Listener, Note
from chainfed_ray.api.report.fleet import by_class
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.client.messages import Client, TurnOrder
from chainfed_ray.client.pool import ClientPool, LocalPool, Outcome
from chainfed_ray.client.survey import Absence, ClientSurvey, Survey
from chainfed_ray.cluster.queries.totals import JobTotals
from chainfed_ray.cluster.tables import Event
from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.federation.collect import check_fruitful
from chainfed_ray.federation.run import run_job
from chainfed_ray.federation.state import stack_of
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.accountant import Release, epsilon
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.fleet import ExcludedClients, late_clients
from chainfed_ray.records.result import JobResult
from chainfed_ray.records.rounds import FailedTurn, JobFinished, JobStarted, Round
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from tests.builders import PRIVACY, a_job, a_round, a_start, assert_same, with_secret
from tests.pools import Altered, Killed, dying

pytestmark = pytest.mark.slow
NOT_THERE = Absence("it did not answer within 3 s", may_come=True)


class Late:
    """A site that is not there when the job begins. It gives its ``answer`` when it is asked once more than ``quiet`` times."""

    def __init__(self, answer: Survey | Absence, quiet: int) -> None:
        self._answer, self._quiet = answer, quiet

    def survey(self, spec: JobSpec, base: Path, listen: Listener) -> Mapping[str, Survey | Absence]:
        """See ``Sites``."""
        return {"clinic": NOT_THERE}

    def late(self, besides: Collection[str]) -> Mapping[str, Survey | Absence]:
        """See ``Sites``."""
        self._quiet -= 1
        return {} if "clinic" in besides or self._quiet >= 0 else {"clinic": self._answer}

    def planned(self, memory: MemoryProfile) -> None:
        """See ``Sites``."""


class Carried(Altered):
    """A pool that takes the turns of clients at a site here, on ``rows``."""

    def __init__(self, pool: ClientPool, rows: Examples) -> None:
        super().__init__(pool, lambda client, order, answer: answer)
        self._rows = rows

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        here = [replace(each, examples=self._rows, remote=None) if each.remote else each for each in clients]
        yield from super().run(here, order, deadline)


@pytest.fixture
def rows(document: dict[str, Any], tmp_path: Path) -> Examples:
    """The rows of the clinic; and the document is that of a job with three phones and this site."""
    candidate, _ = a_job(document, tmp_path).admitted[-1]
    document["fleet"]["clients"][0]["count"] = 3
    document["fleet"]["clients"] += [{"name": "clinic", "memory": "64MiB", "site": "far", "data": "site:rows.jsonl"}]
    document["rounds"] |= {"clients": 5, "quorum": 2, "total": 3}
    return candidate.examples


def survey(rows: Examples, classes: Sequence[str] = ("sea", "sky")) -> Survey:
    return Survey((ClientSurvey(rows.counts, dict.fromkeys(classes, 2)),))


def records(
    document: dict[str, Any], folder: Path, rows: Examples, site: Late, turns: int | None = None
) -> Iterator[Record]:
    """The records of the job; with ``turns``, its process dies after so many of them."""

    def pool(base: ModelSource, note: Note) -> ClientPool:
        here = Carried(LocalPool(base), rows)
        return here if turns is None else dying(here, turns)

    return run_job(parse_job(document), folder, pool=pool, sites=site)


def die_before_the_record_of_round_1(patch: pytest.MonkeyPatch) -> None:
    """The process dies when it has written the tensors of the second round, but not its record."""
    replace_file = Path.replace

    def once(path: Path, target: Path) -> Path:
        if target.name == "000001.json":
            raise Killed
        return replace_file(path, target)

    patch.setattr(Path, "replace", once)


def end_of(folder: Path) -> Tensors:
    return stack_of(CommitLog(folder).tensors(2)).tensors()


def test_a_site_that_comes_takes_part_from_the_next_round_on_also_in_a_job_that_is_resumed(
    document: dict[str, Any], rows: Examples, tmp_path: Path
) -> None:
    started, *rounds, finished = list(records(document, tmp_path / "whole", rows, Late(survey(rows), quiet=1)))
    assert isinstance(started, JobStarted)
    assert isinstance(finished, JobFinished)
    assert [group.reason for group in started.excluded] == ["site far takes no part yet: it did not answer within 3 s"]
    of_rounds = [record for record in rounds if isinstance(record, Round)]
    phones = ["phone-0", "phone-1", "phone-2"]
    assert [[turn.client for turn in one.turns] for one in of_rounds] == [phones, *2 * [[*phones, "clinic-0"]]]
    assert [len(one.late) for one in of_rounds] == [0, 1, 0]
    assert of_rounds[1].turns[3].examples == len(rows) == of_rounds[1].late[0].clients[0].examples
    (late,), began = of_rounds[1].late, len(started.admitted)
    (line,) = late_clients(began, [late])
    assert (line.client, line.examples, line.budget_bytes) == ("clinic-0", len(rows), 64 * 2**20)
    assert line.plan == began
    assert line.planned_bytes == late.admitted[0].planned_bytes

    # Killed after the round in which it came, and resumed: nobody asks the site again.
    halves = records(document, tmp_path / "halves", rows, Late(survey(rows), quiet=1))
    for _ in range(3):
        next(halves)
    halves.close()  # type: ignore[attr-defined]  # a generator
    list(records(document, tmp_path / "halves", rows, Late(NOT_THERE, quiet=100)))
    assert_same(end_of(tmp_path / "whole"), end_of(tmp_path / "halves"))

    # Killed just before that round was committed, and resumed: the site's answer is still there, and the bits are the same.
    with pytest.MonkeyPatch.context() as patch:
        die_before_the_record_of_round_1(patch)
        killed = records(document, tmp_path / "commit", rows, Late(survey(rows), quiet=1))
        with pytest.raises(Killed):
            list(killed)
    assert [one.late for one in CommitLog(tmp_path / "commit").rounds()] == [()]
    resumed = list(records(document, tmp_path / "commit", rows, Late(survey(rows), quiet=0)))
    assert [one.late for one in resumed if isinstance(one, Round)] == [one.late for one in of_rounds]
    assert_same(end_of(tmp_path / "whole"), end_of(tmp_path / "commit"))

    # Killed in that round, after two of its four turns, and the site is gone: it is taken in anew when it comes again.
    with pytest.raises(Killed):
        list(records(document, tmp_path / "turn", rows, Late(survey(rows), quiet=1), turns=3 + 2))
    later = records(document, tmp_path / "turn", rows, Late(survey(rows), quiet=1))
    assert [len(one.late) for one in later if isinstance(one, Round)] == [0, 0, 1]

    # It is counted as one that takes part, and no longer as one that does not.
    found = {fleet.name: (fleet.clients, fleet.excluded, fleet.turns) for fleet in by_class(started, of_rounds)}
    assert found == {"phone": (3, 0, 9), "clinic": (1, 0, 2)}
    assert JobResult.of("tiny", started, of_rounds, finished).excluded == ()
    totals = JobTotals()
    for seq, (kind, record) in enumerate([("started", started), *(("round", one) for one in of_rounds)], start=1):
        totals.add(Event(seq, kind, "", record.model_dump(mode="json")))
    assert totals.classes["clinic"].turns == 2


def test_a_job_whose_sites_all_stay_away_names_them(document: dict[str, Any], rows: Examples, tmp_path: Path) -> None:
    del document["fleet"]["clients"][0]
    document["data"]["validation"] = document["data"]["test"] = document["data"].pop("train")
    with pytest.raises(InvalidJob, match="site far takes no part yet: it did not answer within 3 s"):
        next(records(document, tmp_path / "log", rows, Late(NOT_THERE, quiet=0)))


def test_a_private_job_keeps_a_place_for_a_site_that_comes_later(
    document: dict[str, Any], rows: Examples, tmp_path: Path
) -> None:
    """It samples from as many clients before the site comes as after, so ε is the same whoever comes."""
    document["privacy"] = PRIVACY
    document["rounds"] |= {"clients": 4}
    one_of_each = Late(survey(rows), quiet=1)
    _, *rounds, finished = list(records(document, with_secret(b"s" * 32, tmp_path / "whole"), rows, one_of_each))
    found = [record for record in rounds if isinstance(record, Round)]
    assert [[turn.client for turn in one.turns][3:] for one in found] == [[], ["clinic-0"], ["clinic-0"]]
    failed = [[(turn.client, turn.reason) for turn in one.failed_turns] for one in found]
    assert failed == [[("clinic-0", "site far has not come, or cannot take part")], [], []]
    release = Release(rate=4 / 4, multiplier=PRIVACY["noise_multiplier"])
    assert [one.epsilon for one in found] == [epsilon([release] * (place + 1), 1e-5) for place in range(3)]
    assert isinstance(finished, JobFinished)

    # Killed after its second round, and resumed: the same samples, noise and bits.
    halves = records(document, with_secret(b"s" * 32, tmp_path / "halves"), rows, Late(survey(rows), quiet=1))
    for _ in range(3):
        next(halves)
    halves.close()  # type: ignore[attr-defined]  # a generator
    list(records(document, tmp_path / "halves", rows, Late(NOT_THERE, quiet=100)))
    assert_same(end_of(tmp_path / "whole"), end_of(tmp_path / "halves"))

    # A site that makes two clients of its file has one place.
    two = Survey(2 * survey(rows).clients)
    _, first, *_ = records(document, tmp_path / "two", rows, Late(two, quiet=0))
    assert isinstance(first, Round)
    (excluded,) = first.late[0].excluded
    assert "it makes 2 clients of its file, and ε was computed with one for it" in excluded.reason
    assert [turn.client for turn in first.failed_turns] == ["clinic-0"]


@pytest.mark.parametrize(
    ("classes", "refusal", "reason"),
    [
        (
            ("sea", "sun"),
            None,
            "it has rows of classes that the job did not have when it began (sun); `data.classes` lists",
        ),
        ((), "it takes part in jobs with privacy alone", "it takes part in jobs with privacy alone"),
    ],
)
def test_a_site_that_comes_and_cannot_take_part_is_on_record_with_the_reason(
    document: dict[str, Any],
    rows: Examples,
    tmp_path: Path,
    classes: tuple[str, ...],
    refusal: str | None,
    reason: str,
) -> None:
    document["rounds"] |= {"total": 1}
    answer = Absence(refusal) if refusal else survey(rows, classes)
    started, one, _ = list(records(document, tmp_path / "log", rows, Late(answer, quiet=0)))
    assert isinstance(started, JobStarted)
    assert isinstance(one, Round)
    assert [turn.client for turn in one.turns] == ["phone-0", "phone-1", "phone-2"]
    (excluded,) = started.with_late(one.late).excluded
    assert isinstance(excluded, ExcludedClients)
    assert excluded.reason.startswith(f"site far takes no part: {reason}")


def test_places_that_are_kept_for_sites_do_not_end_a_job_whose_clients_answer() -> None:
    """Rounds may sample more places than clients. Clients that are there, and fail as often, end it."""
    started = a_start()
    away = FailedTurn(client="ward-0", client_class="ward", reason="site ward has not come", awaited=True)
    for failed in (away, away.model_copy(update={"awaited": False})):
        rounds = [a_round(index, started, failed_turns=(failed,)) for index in range(3)]
        quorum = len(rounds[0].turns) + 1
        if failed.awaited:
            check_fruitful(rounds, quorum)
        else:
            with pytest.raises(QuorumLost, match="rounds 1 to 3"):
                check_fruitful(rounds, quorum)
