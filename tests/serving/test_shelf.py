"""What is loaded stays within its bytes, and what is in use stays."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.errors import InvalidJob, ServiceBusy
from chainfed_ray.serving.shelf import Shelf

SIZES = {"a": 3, "b": 4, "c": 5, "d": 2}


def taken(shelf: Shelf, key: str) -> str:
    with shelf.using(key, lambda: SIZES[key], lambda: key.upper()) as value:
        return str(value)


@pytest.mark.slow
@given(wanted=st.lists(st.sampled_from(sorted(SIZES)), max_size=30), most=st.integers(5, 14))
def test_it_is_a_cache_of_what_was_used_last(wanted: list[str], most: int) -> None:
    """Compared with a list of names, the one used last at its end."""
    shelf, plain, loads = Shelf(most), list[str](), 0
    for key in wanted:
        assert taken(shelf, key) == key.upper()
        if key not in plain:
            loads += 1
            while sum(SIZES[held] for held in plain) + SIZES[key] > most:
                plain.pop(0)
        plain = [held for held in plain if held != key] + [key]
        assert shelf.held_bytes == sum(SIZES[held] for held in plain) <= most
    assert (shelf.loaded, shelf.found) == (loads, len(wanted) - loads)


def test_what_is_in_use_stays() -> None:
    shelf = Shelf(8)
    with ExitStack() as used:
        used.enter_context(shelf.using("a", lambda: 3, lambda: "A"))
        used.enter_context(shelf.using("b", lambda: 4, lambda: "B"))
        with pytest.raises(ServiceBusy, match="too many models in use"):
            taken(shelf, "c")
    assert taken(shelf, "c") == "C"
    assert shelf.held_bytes == 5, "both had to make room"


class Busy:
    is_idle = False


def test_what_says_that_it_is_busy_stays() -> None:
    shelf, busy = Shelf(6), Busy()
    with shelf.using("busy", lambda: 4, lambda: busy):
        pass
    with pytest.raises(ServiceBusy):
        taken(shelf, "a")
    busy.is_idle = True
    assert taken(shelf, "a") == "A"


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(InvalidJob, match=r"2KiB.*at most 1KiB"), Shelf(1024).using("x", lambda: 2048, lambda: "X"):
        pass


def test_it_is_loaded_once_and_who_waits_gets_the_error_too() -> None:
    shelf, go_on, calls = Shelf(8), Event(), list[int]()

    def broken() -> None:
        calls.append(1)
        go_on.wait(30)
        raise OSError("no such file")

    def ask() -> None:
        with shelf.using("a", lambda: 3, broken):
            raise AssertionError

    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask) for _ in range(2)]
        while shelf.found + shelf.loaded < 2:
            pass
        go_on.set()
        for answer in asked:
            with pytest.raises(OSError, match="no such file"):
                answer.result(30)
    assert calls == [1]
    assert shelf.held_bytes == 0
    assert taken(shelf, "a") == "A", "another try may do"
