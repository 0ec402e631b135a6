"""The fixtures that many tests share: a tiny model, rows, a job, and one Ray cluster."""

import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
import torch
from hypothesis import settings
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from transformers import AutoTokenizer

from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.hub import resolve
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.prepare import PlannedJob
from tests import postgres
from tests import s3 as s3_server
from tests.builders import a_document, a_job, smallest_budget
from tests.clusters import a_pool, one_machine
from tests.lacking import without
from tests.models import tiny

torch.set_num_threads(1)
# Tests end processes, and never the machine: what a process has written is safe with the kernel. To wait for the disk besides,
# as each commit does, took a fourteenth of the time of all tests.
os.fsync = lambda _file: None
settings.register_profile("any machine", deadline=None)  # one that is busy with other things is slow at times
settings.load_profile("any machine")

_WORDS = {
    "sea": ("wave", "salt", "ship", "tide"),
    "sky": ("cloud", "star", "wind", "bird"),
    "soil": ("root", "worm", "seed", "clay"),
}
_KNOWN_WORDS = 3_000  # the commonest tokens, besides the words of the rows


@pytest.fixture(autouse=True)
def quick_collections() -> None:
    """Freeze the objects that are there before a test, so that the garbage collection before each measured turn is quick.

    Libraries load more of themselves from test to test: a collection of all of it takes as long as a small turn.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer BERT with a real tokenizer, without its rarer words: every job loads it several times."""
    folder = tiny("bert", tmp_path_factory.mktemp("model") / "tiny", vocabulary=30522)
    AutoTokenizer.from_pretrained(resolve("builtin:minilm")).save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    words = whole["model"]["vocab"]
    of_rows = {word for kind in _WORDS.values() for word in kind}
    kept = {word: number for word, number in words.items() if number < _KNOWN_WORDS or word in of_rows}
    whole["model"]["vocab"] = kept
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 120 rows, of three classes with different words."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"text": " ".join(words[(row + place) % 4] for place in range(3 + row % 4)), "label": label}
        for row in range(40)
        for label, words in _WORDS.items()
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def document(tiny_model_folder: Path, tiny_data: Path) -> dict[str, Any]:
    """The document of a job that takes seconds. A test changes the keys that it is about."""
    return a_document(tiny_model_folder, tiny_data)


@pytest.fixture
def mixed(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    """A job with two clients that can hold a window of 3, and two that can hold a window of 1."""
    document["chain"] |= {"window": 3, "start": 1, "adapter": {"bottleneck": 4096}}
    document["rounds"] |= {"total": 1, "clients": 4, "quorum": 4}
    small = smallest_budget(document, tmp_path / "any", 2) - 1
    document["fleet"] = {
        "clients": [{"name": "large", "count": 2, "memory": "1GiB"}, {"name": "small", "count": 2, "memory": small}]
    }
    job = a_job(document, tmp_path / "mixed")
    assert [len(client.plan.window) for client in job.clients] == [3, 3, 1, 1]
    return job


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """The Ray cluster of this process, of which there can be only one."""
    with one_machine():
        yield


@pytest.fixture(scope="session")
def shared_pool(cluster: None, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    """A pool of two processes for jobs on the tiny model. Tests share it, since a process takes ten seconds to start."""
    with a_pool(ModelSource(tiny_model_folder, torch.float32, tmp_path_factory.mktemp("shared")), slots=2) as pool:
        yield pool


@pytest.fixture
def ray_pool(shared_pool: RayPool) -> RayPool:
    """The shared pool for one job. The caches of earlier jobs are removed, since their clients had other rows."""
    shutil.rmtree(shared_pool.base.scratch, ignore_errors=True)
    return shared_pool


@pytest.fixture(scope="session")
def blank_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tables of this version and nothing in them. Alembic takes longer to make them than a copy takes."""
    root = tmp_path_factory.mktemp("blank")
    JobStore(Storage.at(root).database).close()
    return root


@pytest.fixture
def storage(tmp_path: Path, blank_storage: Path) -> Storage:
    return Storage.at(shutil.copytree(blank_storage, tmp_path / "storage"))


@pytest.fixture(scope="session")
def s3() -> Iterator[s3_server.Server]:
    """A real S3 server. A test takes a prefix of its own."""
    program = s3_server.installed()
    if program is None:
        without("the S3 server of the tests is not installed: make .venv-s3/.installed")
    with s3_server.server(program) as started:
        yield started


@pytest.fixture
def far(s3: s3_server.Server, tmp_path: Path) -> Storage:
    """A storage in S3, with nothing in it."""
    return Storage.at(tmp_path / "machine", f"sqlite:///{tmp_path / 'far.db'}", url=s3.url(token_hex(8)))


@pytest.fixture
def store(storage: Storage) -> Iterator[JobStore]:
    made = JobStore(storage.database)
    yield made
    made.close()


@pytest.fixture
def keys(storage: Storage) -> Iterator[KeyStore]:
    made = KeyStore(storage.database)
    yield made
    made.close()


@pytest.fixture
def uploads(storage: Storage, store: JobStore) -> Iterator[UploadStore]:
    made = UploadStore(storage)
    yield made
    made.close()


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    if (programs := postgres.installed()) is None:
        without("no PostgreSQL server is installed")
    with postgres.server(programs) as started:
        yield started.url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    url: str = request.getfixturevalue("empty_postgresql")
    return url


@pytest.fixture
def empty_postgresql(postgresql: str) -> str:
    """The URL of a database of PostgreSQL without a table."""
    engine = create_engine(postgresql)
    with engine.begin() as connection:
        connection.execute(sql("drop schema public cascade"))
        connection.execute(sql("create schema public"))
    engine.dispose()
    return postgresql
