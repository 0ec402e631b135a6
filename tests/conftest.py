"""How the tests are run: what is loaded where, and which tests share a process. The fixtures are in ``fixtures.py``."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Where Python was told to keep no bytecode, each of some hundred processes would compile this project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Files whose tests share the Ray cluster of one process, and the file that starts its own clusters.
WITH_RAY = (
    "test_cohort_ray.py",
    "test_coordinators_ray.py",
    "test_offload.py",
    "test_over_sites.py",
    "test_preflight_ray.py",
    "test_privacy_ray.py",
    "test_ray_pool.py",
)
WITH_SERVICE = "test_service.py"


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and with them torch: not in the process that only gives the tests to others."""
    gives_to_others = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not gives_to_others:
        from chainfed_ray.device.lean_imports import load_models

        load_models()  # the tests need no more of the libraries than the processes of the project do
        config.pluginmanager.import_plugin("tests.fixtures")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process of pytest-xdist, and all files that share a Ray cluster to the same process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if Path(file).name in WITH_RAY else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files first, so that no process is still busy with one when all others have finished."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        shares = "cluster" in getattr(item, "fixturenames", ())
        assert item.path.name in WITH_RAY or not shares, f"{item.path.name} is missing in WITH_RAY of conftest.py"
    items.sort(key=lambda item: (item.path.name not in WITH_RAY, item.path.name != WITH_SERVICE, item.path not in slow))
