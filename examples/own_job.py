"""The job of the examples in Python: sentences of docstrings, eight clients of 64 MiB, a minute or two of one core."""

from typing import Any

from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job


def a_job(name: str, **sections: Any) -> JobSpec:
    """A job called ``name``; ``sections`` are more of its document."""
    return parse_job(
        {
            "name": name,
            "model": {"base": "builtin:minilm"},
            "data": {"train": "builtin:docstrings"},
            "fleet": {"clients": [{"name": "phone", "count": 8, "memory": "64MiB"}]},
            "rounds": {"total": 6, "clients": 8, "local_steps": 10},
            **sections,
        }
    )
