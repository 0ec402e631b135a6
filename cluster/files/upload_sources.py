"""Which uploads a job names, that they stay as long as it may read them, and the rules by which it reads with them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import UploadRow
from chainfed_ray.errors import InvalidJob
from chainfed_ray.problem import Problem
from chainfed_ray.reading import OWN_UPLOAD, ReadingRules, UploadedFile

_SCHEME = "upload:"
_KEYS = (("data", "train"), ("data", "validation"), ("data", "test"), ("evaluation", "choices"))
FilesOf = Callable[[str, dict[str, Any]], Mapping[str, UploadedFile]]
"""The files of the uploads that a tenant's job reads, by their ids."""


def uploads_in(document: dict[str, Any]) -> set[str]:
    """The ids of the uploads that a job's document names, in any of the keys that name rows."""
    return set(_named(document).values())


def hold_uploads(session: Session, tenant: str, document: dict[str, Any]) -> None:
    """Lock the uploads that a tenant's job names until the transaction ends, which has written the job already.

    ``UploadStore.delete`` deletes an upload first, and then looks for jobs that name it. So whichever of the two transactions
    is the first, the other one sees what it did.

    Raises:
        InvalidJob: an upload is not there, or not complete.
    """
    named = _named(document)
    own = (UploadRow.tenant == tenant, UploadRow.complete.is_(True), UploadRow.id.in_(set(named.values())))
    found = set(session.scalars(select(UploadRow.id).where(*own).with_for_update(read=True))) if named else set()
    problems = [
        Problem(field, f"{_SCHEME}{upload}", OWN_UPLOAD) for field, upload in named.items() if upload not in found
    ]
    if problems:
        raise InvalidJob(tuple(problems))


def _named(document: dict[str, Any]) -> dict[str, str]:
    """The id of the upload that each key names, of those that name one."""
    sources = {f"{section}.{key}": document.get(section, {}).get(key) for section, key in _KEYS}
    return {
        key: source.removeprefix(_SCHEME) for key, source in sources.items() if source and source.startswith(_SCHEME)
    }


def no_files(tenant: str, document: dict[str, Any]) -> Mapping[str, UploadedFile]:
    """See ``FilesOf``: where no uploads are kept, there are none."""
    return {}


def rules_of_job(
    rules: ReadingRules, reads_anything: bool, files: FilesOf, tenant: str, document: dict[str, Any]
) -> ReadingRules:
    """The rules by which a tenant's job reads: those of the service, closed unless it ``reads_anything``, and its uploads."""
    return replace(rules if reads_anything else rules.closed(), uploads=files(tenant, document))
