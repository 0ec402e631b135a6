"""What the section ``privacy`` changes in a job's rounds; without it, nothing."""

from collections.abc import Sequence
from dataclasses import replace

from chainfed_ray.aggregation.accountant import Ledger
from chainfed_ray.aggregation.mean import Aggregate, aggregate_by
from chainfed_ray.aggregation.privacy import private_mean, sampling_seed, share_of
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import Round
from chainfed_ray.spec.job import JobSpec


class PrivacyPolicy:
    """The privacy of a job, of which ``admitted`` clients may be sampled; its secret is kept in ``log``."""

    def __init__(self, spec: JobSpec, log: CommitLog, admitted: int) -> None:
        self._spec, self._privacy, self._log = spec, spec.privacy, log
        self._ledger = Ledger(spec, admitted) if spec.privacy else None

    @property
    def sampling_seed(self) -> int:
        """From which it follows who is sampled: the job's seed, or a secret."""
        return sampling_seed(self._log.secret()) if self._privacy else self._spec.seed

    def prepared(self, clients: Sequence[Client], index: int) -> list[Client]:
        """Clients for a turn in round ``index``; where they add noise themselves, each with its share of it."""
        if self._privacy is None or self._privacy.where == "server":
            return list(clients)
        secret, count = self._log.secret(), self._spec.rounds.clients
        return [
            replace(client, share=share_of(self._privacy, secret, index, client.name, client.plan.window, count))
            for client in clients
        ]

    @property
    def total(self) -> int:
        """Rounds of the whole job, within its limit of ε."""
        return self._ledger.total if self._ledger else self._spec.rounds.total

    def counts(self, answered: int) -> bool:
        """Whether a round counts of which so many answered. With privacy all do: that one does not would tell of its sample."""
        return self._privacy is not None or answered >= self._spec.quorum

    def sent(self, own: Window, stage: Window) -> Window:
        """The window whose tensors a client sends that trains its ``own``: with noise of its own, all of the ``stage``'s."""
        return stage if self._privacy and self._privacy.where == "client" else own

    def aggregate(self, index: int, start: Tensors) -> Aggregate:
        """What takes the updates of round ``index``, which moves the tensors of ``start``."""
        if self._privacy is None:
            return aggregate_by(self._spec.aggregation)
        return private_mean(self._privacy, self._log.secret(), index, start, self._spec.rounds.clients)

    def priced(self, record: Round, history: Sequence[Round]) -> Round:
        """The record of the round after ``history``, with ε of all of them."""
        return record.model_copy(update={"epsilon": self.epsilon([*history, record])})

    def epsilon(self, history: Sequence[Round]) -> float | None:
        """ε of the rounds so far; None without privacy."""
        return self._ledger.spent(len(history)) if self._ledger else None

    def stopped(self, history: Sequence[Round]) -> str | None:
        """Why the rounds so far are all, though the job asks for more, if it is its limit of ε."""
        return self._ledger.stopped() if self._ledger and len(history) == self._ledger.total else None
