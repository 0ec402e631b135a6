"""Promises of the watch over Ray: what hangs, or has ended, is told in words, also where whoever waits for it hears nothing."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Event, Thread, current_thread

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


def test_silence_counts_by_looks_and_not_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may be stopped, or have no processor, and so may Ray."""
    now = 0.0
    monkeypatch.setattr(f"{WATCH}.monotonic", lambda: now)
    watch = RayWatch({})

    def told(seconds: float) -> str | None:
        nonlocal now
        now += seconds
        return watch.failure()

    assert [told(1) for _ in range(5)] == [None] * 5
    assert [told(seconds) for seconds in (44, 1, 1, 1000, 44, 1)] == [None] * 6, "nobody asked all the while"
    watch.hear(True)
    assert [told(1) for _ in range(45)] == [None] * 45
    assert told(1) == "Ray has not answered for 46s"
    watch.hear(True)
    assert told(1) is None


def test_what_is_done_is_not_told_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look may take until after the end, which ends Ray."""
    asked, ended = Event(), Event()
    told, threads = list[str](), list[Thread]()

    def failure(_: RayWatch) -> str:
        threads.append(current_thread())
        asked.set()
        assert ended.wait(10)
        return "Ray's raylet has ended"

    monkeypatch.setattr(f"{WATCH}.core_processes", dict)
    monkeypatch.setattr(f"{WATCH}.hears_of_machine", lambda: True)
    monkeypatch.setattr(f"{WATCH}._LOOK_SECONDS", 0.02)
    monkeypatch.setattr(RayWatch, "failure", failure)
    with watching_ray(told.append, nullcontext):
        assert asked.wait(10)
    ended.set()
    threads[0].join(10)
    assert not told


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
