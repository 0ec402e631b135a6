"""What people ask of a job: to pause, to go on, to end. Each asks for a state, and says why the job cannot get there.

A process of the API calls these. The controller and the job's coordinator then do what the state asks for. All are safe to
call twice: a job that is already there stays as it is.
"""

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import JobRecord, Status
from chainfed_ray.errors import JobConflict


def pause(store: JobStore, job: str) -> JobRecord:
    """Pause a job: one that runs as soon as its present round is committed, one that waits at once.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job is over, or is to end.
    """
    store.get(job)
    # The job may start, or end, between two calls. Then the first move fails, and the next one is made from where it is.
    if not store.move(job, "paused", before=("queued",)):
        store.move(job, "pausing")
    return _reached(store, job, ("pausing", "paused"), "be paused")


def resume(store: JobStore, job: str, most_queued: int | None = None) -> JobRecord:
    """Let a paused job go on from its last commit. It waits in the queue for a free place, where its place is by its age.

    A job that is about to pause goes on at once. The tenant may have ``most_queued`` jobs in the queue.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job is over, or is to end.
        LimitReached: the tenant has as many jobs in the queue as it may.
    """
    store.get(job)
    if not store.move(job, "running", before=("pausing",)):
        store.move(job, "queued", before=("paused",), most_queued=most_queued)
    return _reached(store, job, ("queued", "validating", "running"), "be resumed")


def cancel(store: JobStore, job: str) -> JobRecord:
    """Cancel a job. Its commits are kept. One that has begun is ``cancelling`` until its processes have ended.

    Raises:
        JobNotFound: there is no such job.
        JobConflict: the job has a result, or has failed.
    """
    if store.get(job).started_at is not None or not store.move(job, "cancelled", before=("queued",)):
        store.move(job, "cancelling")
    return _reached(store, job, ("cancelling", "cancelled"), "be cancelled")


def _reached(store: JobStore, job: str, wanted: tuple[Status, ...], asked: str) -> JobRecord:
    record = store.get(job)
    if record.status not in wanted:
        raise JobConflict(job, record.status, asked)
    return record
