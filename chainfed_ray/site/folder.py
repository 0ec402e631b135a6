"""The folder that a site offers: a job may name files in it, and nowhere else."""

from pathlib import Path

from chainfed_ray.errors import InvalidJob
from chainfed_ray.reading import reading_from

_KEY = "fleet.clients.data"


def offered(folder: Path, data: str) -> Path:
    """The file or folder that ``data``, such as ``site:notes.jsonl``, names in ``folder``, with every link followed.

    Raises:
        InvalidJob: there is none, it is neither a file nor a folder, or it or a file in it leads out of ``folder``.
        OSError: the disk does not work.
    """
    name = data.removeprefix("site:")
    root = folder.resolve()
    # Such as a name that is too long, a null character, links in a circle.
    with reading_from(data, lambda _: InvalidJob.at(_KEY, data, "a path that can be read")):
        found = (root / name).resolve()
        if not found.is_relative_to(root):
            raise InvalidJob.at(_KEY, data, "a path that stays in the folder which the site offers")
        if not found.is_file() and not found.is_dir():
            raise InvalidJob.at(_KEY, data, "a file or folder that the site offers")
        inside = found.rglob("*") if found.is_dir() else ()
        if any(not file.resolve().is_relative_to(root) for file in inside):
            raise InvalidJob.at(_KEY, data, "a folder without links that lead out of what the site offers")
    return found
