"""Which uploads a job names, and the rules by which it reads with them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from chainfed_ray.reading import ReadingRules, UploadedFile

_SCHEME = "upload:"
_KEYS = (("data", "train"), ("data", "validation"), ("data", "test"), ("evaluation", "choices"))
FilesOf = Callable[[str, dict[str, Any]], Mapping[str, UploadedFile]]
"""The files of the uploads that a tenant's job reads, by their ids."""


def uploads_in(document: dict[str, Any]) -> set[str]:
    """The ids of the uploads that a job's document names, in any of the keys that name rows."""
    sources = (document.get(section, {}).get(key) for section, key in _KEYS)
    return {source.removeprefix(_SCHEME) for source in sources if source and source.startswith(_SCHEME)}


def no_files(tenant: str, document: dict[str, Any]) -> Mapping[str, UploadedFile]:
    """See ``FilesOf``: where no uploads are kept, there are none."""
    return {}


def rules_of_job(
    rules: ReadingRules, reads_anything: bool, files: FilesOf, tenant: str, document: dict[str, Any]
) -> ReadingRules:
    """The rules by which a tenant's job reads: those of the service, closed unless it ``reads_anything``, and its uploads."""
    return replace(rules if reads_anything else rules.closed(), uploads=files(tenant, document))
