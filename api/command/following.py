"""Follows a job of the service, and shows its events on the terminal."""

from itertools import dropwhile

from pydantic import ValidationError
from rich.console import Console

from chainfed_ray.activity import Activity
from chainfed_ray.api.report.progress import ProgressDisplay
from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.errors import JobFailed, ServiceUnavailable
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.job import JobSpec

Records = tuple[JobStarted, list[Round], JobFinished]
_NAMED = 3  # how many of the jobs ahead in the queue are named


def follow(client: Client, job: str, spec: JobSpec, console: Console) -> Records | None:
    """Show the job with the id ``job`` until it is over, and return its records.

    None if they are of an earlier version: then the changes of the job's state are shown alone.

    Raises:
        JobFailed: the job failed, or was cancelled.
    """
    job_started: JobStarted | None = None
    job_finished: JobFinished | None = None
    rounds: list[Round] = []
    failed: JobFailed | None = None
    is_earlier = False
    with ProgressDisplay(console, job, spec) as progress:
        for event in client.stream_json(exchanges.events(job, listen=progress.listen)):
            failed = None  # one that was tried again has not failed
            match event["kind"]:
                case "queued":
                    progress.say("In the queue." + _jobs_before(client, job))
                    progress.listen(Activity(what="waiting in the queue"))
                case "waiting":
                    progress.say(f"It waits: {event['data']['message']}.")
                case "validating":
                    progress.idle()
                    progress.say("The job is validated: its model, its rows and its clients.")
                case "running":
                    progress.idle()
                    progress.say("The job goes on." if job_started else "The job starts.")
                case "started" | "round" | "finished" if is_earlier:
                    pass
                case "started":
                    try:
                        job_started = JobStarted.model_validate(event["data"])
                    except ValidationError:
                        is_earlier = True
                        progress.say("Its records are of an earlier version: its rounds are not shown.")
                    else:
                        progress.job_started(job_started)
                case "round":
                    rounds.append(Round.model_validate(event["data"]))
                    progress.round(rounds[-1])
                case "no_machine":
                    progress.say(
                        f"Class {event['data']['client_class']} does not take part: {event['data']['reason']}."
                    )
                case "damaged":
                    progress.say(f"A commit is damaged: {event['data']['reason']}.")
                case "finished":
                    job_finished = JobFinished.model_validate(event["data"])
                    progress.job_finished(job_finished)
                case "pausing":
                    progress.say("Pausing after this round.")
                case "paused":
                    progress.idle()
                    progress.say(f"Paused; `chainfed resume {job}` lets it go on.")
                case "cancelling":
                    progress.say("Cancelling.")
                case "failed" | "cancelled":
                    failed = JobFailed(job, event["kind"], event["data"].get("message", ""))
        if failed:
            raise failed
    if is_earlier:
        return None
    if job_started is None or job_finished is None:
        raise JobFailed(job, "ended", "its events lack its start or its result")
    return job_started, rounds, job_finished


def _jobs_before(client: Client, job: str) -> str:
    """Say which unfinished jobs are ahead in the queue, such as one that an earlier, interrupted command submitted."""
    try:
        jobs = client.json(calls.list_jobs())["jobs"]
    except ServiceUnavailable:  # no reason to stop following: `exchanges.events` reconnects
        return ""
    found = list(dropwhile(lambda other: other["id"] != job, jobs))
    if not found or found[0]["status"] != "queued":  # the event is an old one: the job has started, or is over
        return ""
    older = found[1:]
    before = [f"{other['id']} ({other['status']})" for other in reversed(older) if other["finished_at"] is None]
    more = f" and {len(before) - _NAMED} more" if len(before) > _NAMED else ""
    return f" Before it: {', '.join(before[:_NAMED])}{more}." if before else ""
