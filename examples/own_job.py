"""The job that the Python examples share: docstrings, eight clients of 64 MiB. It takes a minute or two on one core."""

from typing import Any

from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job


def a_job(name: str, **sections: Any) -> JobSpec:
    """The job with the name ``name``. ``sections`` are further sections of its document, or replace some."""
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
