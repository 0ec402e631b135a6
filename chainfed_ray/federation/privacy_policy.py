"""What differential privacy changes in a job's rounds. Without the section ``privacy``, it changes nothing."""

from collections.abc import Sequence
from dataclasses import replace

from chainfed_ray.aggregation.aggregate import Aggregate, KeptUpdates, aggregate_by
from chainfed_ray.aggregation.privacy import client_privacy, private_mean, sampling_seed
from chainfed_ray.aggregation.rule import AggregationRule
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client
from chainfed_ray.errors import InvalidJob
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.planning.accountant import Ledger
from chainfed_ray.planning.candidates import Candidate, awaited
from chainfed_ray.record import named
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.fleet import ExcludedClients
from chainfed_ray.records.rounds import Round
from chainfed_ray.spec.job import JobSpec


class PrivacyPolicy:
    """The privacy of a job that samples from ``admitted`` clients, and from those ``absent`` ones that may come.

    Its secret is kept in ``log``. ``aggregation`` is the caller's own rule, in place of the job's.

    Raises:
        InvalidJob: the job has privacy, or classes of clients with ranks of their own, and ``aggregation`` is given.
    """

    def __init__(
        self,
        spec: JobSpec,
        log: CommitLog,
        admitted: Sequence[tuple[Candidate, TurnPlan]],
        absent: Sequence[ExcludedClients] = (),
        aggregation: AggregationRule | None = None,
    ) -> None:
        self._spec, self._privacy, self._log, self._aggregation = spec, spec.privacy, log, aggregation
        if spec.privacy and aggregation is not None:
            expected = "no rule of one's own in a job with privacy: ε is known for the mean alone"
            raise InvalidJob.at("aggregation", named(aggregation), expected)
        if spec.fleet.has_ranks and aggregation is not None:
            expected = "no rule of one's own with fleet.clients[].rank: updates have tensors of different shapes"
            raise InvalidJob.at("aggregation", named(aggregation), expected)
        self._places = [*(candidate for candidate, _ in admitted), *awaited(spec.fleet, absent)] if spec.privacy else []
        self._ledger = Ledger(spec.privacy, spec.rounds, len(self._places)) if spec.privacy else None

    @property
    def sampling_seed(self) -> int:
        """The seed of the samples: the job's own, or with privacy one that follows from the secret."""
        return sampling_seed(self._log.secret()) if self._privacy else self._spec.seed

    def sampled_from(self, admitted: Sequence[tuple[Candidate, TurnPlan]]) -> list[Candidate]:
        """The clients from which a round is sampled, of those ``admitted`` by now.

        With privacy they are as many as when the job began, in the same order: who came late is in the place kept for it.
        """
        now = [candidate for candidate, _ in admitted]
        if not self._privacy:
            return now
        by_name = {candidate.name: candidate for candidate in now}
        return [by_name.get(place.name, place) for place in self._places]

    def prepared(self, clients: Sequence[Client], index: int) -> list[Client]:
        """The clients of round ``index``. With privacy each clips its update, and adds its share of the noise if clients do."""
        if self._privacy is None:
            return list(clients)
        secret, count = self._log.secret(), self._spec.rounds.clients
        return [
            replace(
                client,
                privacy=client_privacy(self._privacy, secret, index, client.name, client.plan.window, count),
            )
            for client in clients
        ]

    @property
    def total(self) -> int:
        """The rounds of the whole job, within its limit of ε."""
        return self._ledger.total if self._ledger else self._spec.rounds.total

    def counts(self, answered: int) -> bool:
        """True if a round counts in which this number of clients ``answered``.

        With privacy every round does: skipping one would tell something about its sample.
        """
        return self._privacy is not None or answered >= self._spec.quorum

    def sent(self, own: Window, stage: Window) -> Window:
        """The window whose tensors a client sends: its ``own``, or all of the ``stage``'s if clients add noise."""
        return stage if self._privacy and self._privacy.where == "client" else own

    def aggregate(self, index: int, start: Tensors, examples: int) -> Aggregate:
        """An empty aggregate for round ``index``, which trains the tensors of ``start`` on ``examples`` of all its clients."""
        if self._privacy is None:
            if self._aggregation is not None:
                return KeptUpdates(start, self._aggregation)
            return aggregate_by(self._spec.aggregation, start, examples, self._spec.fleet.has_ranks)
        return private_mean(self._privacy, self._log.secret(), index, start, self._spec.rounds.clients)

    def priced(self, record: Round, history: Sequence[Round]) -> Round:
        """The record of the round after ``history``, with ε of all rounds so far."""
        return record.model_copy(update={"epsilon": self.epsilon([*history, record])})

    def epsilon(self, history: Sequence[Round]) -> float | None:
        """ε of the rounds so far; None without privacy."""
        return self._ledger.spent(len(history)) if self._ledger else None

    def stopped(self, history: Sequence[Round]) -> str | None:
        """The reason, if the limit of ε ends the job after the rounds so far, before all that it asks for."""
        return self._ledger.stopped() if self._ledger and len(history) == self._ledger.total else None
