"""Promise: Ctrl-C ends the work, whatever Python was at."""

import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest

from chainfed_ray.api.command.interruption import Interruption


@pytest.fixture
def heeding() -> Iterator[None]:
    """A shell's background job, such as these tests may be, is started to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding")
def test_an_interruption_that_was_lost_in_a_callback_ends_the_work_all_the_same() -> None:
    """Python prints what a destructor raises, and goes on."""

    class Careless:
        def __del__(self) -> None:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    before, checks = signal.getsignal(signal.SIGINT), 0
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:  # noqa: PT012
        thing: Careless | None = Careless()
        interruption.check()
        checks += 1
        thing = None
        interruption.check()
        checks += 1
    assert thing is None
    assert checks == 1
    assert signal.getsignal(signal.SIGINT) is before
