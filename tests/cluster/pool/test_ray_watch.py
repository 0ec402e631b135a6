"""Promises of the watch over Ray: what hangs, or has ended, is told in words, also where whoever waits for it hears nothing."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from time import monotonic

import pytest

from chainfed_ray.cluster.pool.ray_watch import RayWatch, watching_ray
from tests.watching import wait_for

WATCH = "chainfed_ray.cluster.pool.ray_watch"


def test_what_has_failed_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "100"]) as raylet:
        watch = RayWatch({"raylet": raylet.pid, "gcs_server": os.getpid()})
        assert watch.failure() is None
        watch.hear(False)
        assert watch.failure() == "Ray's raylet does not answer Ray's GCS"
        watch.hear(True)
        assert watch.failure() is None
        raylet.kill()
        wait_for(watch.failure, "failure", 10)
        assert watch.failure() == "Ray's raylet has ended"
    assert RayWatch({"raylet": raylet.pid}).failure() == "Ray's raylet has ended"
    silent = RayWatch({})
    monkeypatch.setattr(f"{WATCH}.monotonic", lambda: monotonic() + 40)
    assert silent.failure() is None
    monkeypatch.setattr(f"{WATCH}.monotonic", lambda: monotonic() + 80)
    assert str(silent.failure()).startswith("Ray has not answered for 1m 2")
    monkeypatch.setattr(f"{WATCH}.monotonic", lambda: monotonic() + 1000)
    assert silent.failure() is None, "nobody has asked for so long: this process was stopped, and Ray with it"


@pytest.mark.parametrize("when", ["meanwhile", "at the end"])
def test_whoever_waits_for_a_ray_that_hangs_is_told_by_another_thread(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, heard = list[str](), Event()
    monkeypatch.setattr(f"{WATCH}.core_processes", dict)
    monkeypatch.setattr(f"{WATCH}.hears_of_machine", lambda: when == "at the end")
    for name in ("ASK_SECONDS", "_LOOK_SECONDS", "_END_SECONDS"):
        monkeypatch.setattr(f"{WATCH}.{name}", 0.02)

    def tell(words: str) -> None:
        told.append(words)
        heard.set()

    @contextmanager
    def a_ray() -> Iterator[None]:
        yield
        if when == "at the end":
            assert heard.wait(10), "this takes until somebody is told"

    with watching_ray(tell, a_ray):
        if when == "meanwhile":
            assert heard.wait(10)
    assert told == [{"meanwhile": "Ray's raylet does not answer Ray's GCS", "at the end": "Ray does not end"}[when]]
