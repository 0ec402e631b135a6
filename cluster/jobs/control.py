"""What people ask of a job: to pause, to go on, to end, to be tried again, to be deleted.

Each asks for a state, and says why the job cannot get there.

A process of the API calls these. The controller and the job's coordinator then do what the state asks for. All are safe to
call twice: a job that is already there stays as it is. Given jobs ``at`` a revision, they do nothing to a job that has another
one by then, and raise ``PreconditionFailed``. The state comes before the limits.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.jobs.versions import ModelName, trained
from chainfed_ray.cluster.queries.deletions import AliasesChanged
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.errors import JobConflict
from chainfed_ray.records.states import Status

_LOOKS = 10  # at aliases that change meanwhile
CheckFits = Callable[[Mapping[str, object]], None]
"""Checks that the job of a document may ever begin. Raises ``InvalidJob`` if a limit never lets it."""


def pause(store: JobStore, job: str) -> JobRecord:
    """Pause a job: one that runs as soon as its present round is committed, one that waits at once.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job is over, or is to end.
    """
    store.get(job)
    # The job may start, or end, between two calls. Then the first move fails, and the next one is made from where it is.
    moved = store.move(job, "paused", before=("queued",)) or store.move(job, "pausing")
    return _reached(store, job, moved, ("pausing", "paused"), "be paused")


def resume(
    store: JobStore,
    job: str,
    check_fits: CheckFits,
    most_queued: int | None = None,
    most_stored: int | None = None,
) -> JobRecord:
    """Let a paused job go on from its last commit. It waits in the queue for a free place, where its place is by its age.

    A job that is about to pause goes on at once: one whose start is not on record is still to be validated. The job's
    tenant may have ``most_queued`` jobs in the queue, and ``most_stored`` bytes.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job is over, or is to end.
        InvalidJob: ``check_fits`` has refused it.
        LimitReached: the tenant has as many jobs in the queue, or bytes, as it may.
    """
    record = store.get(job)
    if record.status in ("pausing", "paused"):
        check_fits(record.spec)
    goes_on: Status = "running" if store.newest(job, "started") else "validating"
    moved = store.move(job, goes_on, before=("pausing",))
    moved = moved or store.move(job, "queued", before=("paused",), most_queued=most_queued, most_stored=most_stored)
    return _reached(store, job, moved, ("queued", "validating", "running"), "be resumed")


def cancel(store: JobStore, job: str) -> JobRecord:
    """Cancel a job. Its commits are kept. One that has begun is ``cancelling`` until its processes have ended.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job has a result, or has failed.
    """
    moved = store.get(job).started_at is None and store.move(job, "cancelled", before=("queued",))
    moved = moved or store.move(job, "cancelling")
    return _reached(store, job, moved, ("cancelling", "cancelled"), "be cancelled")


def retry(
    store: JobStore,
    job: str,
    check_fits: CheckFits,
    most_queued: int | None = None,
    most_stored: int | None = None,
    folder_of: Callable[[str], Path] | None = None,
) -> JobRecord:
    """Try a job again that failed or was cancelled. It goes on from its last commit, in the queue by its age.

    ``folder_of`` gives the folder of a job's commits: one with noise may have a round there of which no event tells, if its
    process was killed between the two. The job's tenant may have ``most_queued`` jobs in the queue, and ``most_stored`` bytes.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job has not failed and was not cancelled; or it has noise, and cannot go on without its secret.
        LimitReached: the tenant has as many jobs in the queue, or bytes, as it may.
        InvalidJob: ``check_fits`` has refused it, or an upload that the job reads was deleted when it had ended.
        OSError: the commits of a job with noise cannot be looked at.
    """
    record = store.get(job)
    ended: tuple[Status, ...] = ("failed", "cancelled")
    if record.status in ended and record.spec.get("privacy") and _has_round(store, job, folder_of):
        asked = (
            "be tried again: the secret of its noise was erased when it ended, and other noise would weaken its privacy"
        )
        raise JobConflict(job, record.status, asked)
    if record.status in ended:
        check_fits(record.spec)
    moved = store.move(job, "queued", before=ended, most_queued=most_queued, most_stored=most_stored)
    return _reached(store, job, moved, ("queued", "validating", "running"), "be tried again")


def _has_round(store: JobStore, job: str, folder_of: Callable[[str], Path] | None) -> bool:
    """Whether a round of a job was committed."""
    if store.newest(job, "round"):
        return True
    return folder_of is not None and any((folder_of(job) / "rounds").glob("*.json"))


def delete(store: JobStore, job: str) -> None:
    """Delete a job that is over, with its events, its files and its model. The audit log keeps who did what.

    From now on nobody sees it; the controller deletes the files.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job is not over, or an alias stands for its model, whose callers would lose it.
    """
    record = store.get(job)
    own = store.seen_by(record.tenant, everything=False)
    for _ in range(_LOOKS):
        seen = own.aliases.all()
        for alias, shares in seen.items():
            if any(_job_of(own, name) == job for name in shares):
                tenant, slash, _ = record.model.rpartition("/")  # as whoever asks calls what is another tenant's
                named = f"the alias {tenant}{slash}{alias} stands for its model"
                raise JobConflict(job, record.status, f"be deleted: {named}; let it stand for another, or delete it")
        with suppress(AliasesChanged):
            if store.deletions.mark(job, (record.tenant, seen)):
                return
            raise JobConflict(job, store.get(job).status, "be deleted")
    raise JobConflict(job, record.status, "be deleted now: the aliases of its tenant change; send the request again")


def _job_of(store: JobStore, model: str) -> str | None:
    """The job without which nothing, or another model, would answer under the name ``model``, such as ``minilm:support@best``.

    A base model alone is served as long as some job on it is there. One that is not over may fail, so it counts for nothing.
    """
    name = ModelName.of(model)
    if ":" not in name.stem:
        on_base = store.on_base(name.stem, 2, have_succeeded=True)
        return on_base[0].id if len(on_base) == 1 else None
    found = trained(store, name.stem, "latest") if name.version is not None else None
    record = found.record if found else store.model(name.stem)
    return record.id if record else None


def _reached(store: JobStore, job: str, moved: bool, wanted: tuple[Status, ...], asked: str) -> JobRecord:
    if not moved:
        store.check_revision(job)  # or whoever moved it has checked it
    record = store.get(job)
    if not moved and record.status not in wanted:  # one that was moved may have been moved on by another
        raise JobConflict(job, record.status, asked)
    return record
