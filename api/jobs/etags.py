"""Entity tags: whether an answer is known already, and whether a job is as it was when somebody looked at it (RFC 9110, 13).

The tag of a job is ``"<revision>-<digest>"``: two digests, of the event with which it came to its state, and of the whole
answer. The answer of a job at work changes every second, and with it the tag, so ``If-None-Match`` notices whatever the
answer shows. ``If-Match`` is for what is asked of a job, and that depends on its state alone: there only the revision counts.
"""

import re
from typing import Annotated

from fastapi import Depends, Header
from pydantic import Field

from chainfed_ray.api.rest.service import Jobs
from chainfed_ray.cluster.jobs.store import JobStore

_OF_A_JOB = re.compile(r'"([0-9a-f]{16})-[0-9a-f]{32}"')

IfNoneMatch = Annotated[
    list[str] | None,
    Header(
        description="the `ETag` of an earlier answer, or a list of them: if nothing has changed since, the answer is 304, "
        "as it is with `*`"
    ),
]
IfMatch = Annotated[
    list[Annotated[str, Field(max_length=1000)]] | None,
    Header(
        description="the `ETag` of the job, as it was looked at: if its state has changed since, nothing is done, and the "
        "answer is 412. Mere progress is no change. It may be a list, of which one must be the job's, or `*` for any; a weak "
        "one (`W/…`) is never the job's"
    ),
]


def listed(lines: list[str] | None) -> list[str]:
    """The members of a header, which may come in several lines: they are one list (RFC 9110, 5.3)."""
    return [one.strip() for one in ",".join(lines or ()).split(",")]


def is_known(tag: str, lines: list[str] | None) -> bool:
    """Whether ``If-None-Match`` names an answer with this tag; also a weak one does (RFC 9110, 13.1.2)."""
    known = [one.removeprefix("W/") for one in listed(lines)]
    return tag in known or known == ["*"]


def _as_seen(job: str, jobs: Jobs, if_match: IfMatch = None) -> JobStore:
    """The jobs that the caller sees. Of this one nothing is changed unless it is as the caller has looked at it.

    Raises:
        JobNotFound: there is no such job.
        PreconditionFailed: it is another by now.
    """
    named = listed(if_match)
    if if_match is None or named == ["*"]:
        return jobs
    tags = filter(None, map(_OF_A_JOB.fullmatch, named))  # a weak one is none: RFC 9110, 13.1.1
    seen = jobs.at({tag[1] for tag in tags})
    seen.get(job)
    seen.check_revision(job)  # whoever acts checks it again; this one is for what changes nothing, and to refuse early
    return seen


JobsAsSeen = Annotated[JobStore, Depends(_as_seen)]
"""As ``Jobs``, for routes that tell a job what to do."""
