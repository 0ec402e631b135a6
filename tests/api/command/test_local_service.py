"""Promises of the service's owner: a service that does not start or that fails is started again, and at some point given up.

The service is one without Ray (``tests/without_ray.py``): the process that the owner starts answers health checks, and no more.
"""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from chainfed_ray.api.command.local_service import free_port, local_service
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.errors import InvalidSetting, ServiceNotStarted, StorageInUse
from tests.watching import processes_below, running, wait_for
from tests.without_ray import without_ray

NO_KEY = "No key was made, so the service answers to this machine alone, and to whoever uses it."
LOCAL = "chainfed_ray.api.command.local_service"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(Storage.at(tmp_path / "storage"))
    (made.storage.root / "failures").write_text("0")
    return made


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The pauses between tries, none of which lasts."""
    made: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(f"{LOCAL}.sleep", made.append)
        patch.setattr(f"{LOCAL}.run", without_ray)
        yield made


class Enough(Exception):
    """What is told has been heard."""


class Heard(list[str]):
    """What the owner tells. Whoever watches has seen enough when the service answers again."""

    def tell(self, line: str) -> None:
        self.append(line)
        if "again, after" in line:
            raise Enough


@pytest.mark.slow
def test_a_start_that_fails_is_tried_again(settings: Settings, pauses: list[float]) -> None:
    (settings.storage.root / "failures").write_text("2")
    heard = Heard()
    with local_service(settings, "127.0.0.1", free_port("127.0.0.1"), tell=heard.tell):
        assert pauses == [0, 2]
        reason = "The service did not start: a port was taken. Starting it again"
        assert heard == [NO_KEY, f"{reason}.", f"{reason} in 2 s."]
    assert not processes_below("spawn_main")


@pytest.mark.slow
def test_a_start_that_fails_again_and_again_is_given_up(settings: Settings, pauses: list[float]) -> None:
    (settings.storage.root / "failures").write_text("99")
    with (
        pytest.raises(ServiceNotStarted, match=r"a port was taken \(the last of 6 tries\)"),
        local_service(settings, "127.0.0.1", free_port("127.0.0.1")),
    ):
        pass
    assert pauses == [0, 2, 4, 8, 16]


@pytest.mark.slow
def test_what_no_further_try_can_mend_is_said_at_once(settings: Settings, pauses: list[float]) -> None:
    (settings.storage.root / "failures").write_text("99")
    (settings.storage.root / "error").touch()
    with pytest.raises(InvalidSetting, match="TMPDIR"), local_service(settings, "127.0.0.1", free_port("127.0.0.1")):
        pass
    assert not pauses


@pytest.mark.slow
def test_a_service_that_fails_is_started_again(settings: Settings, pauses: list[float]) -> None:
    heard = Heard()
    with local_service(settings, "127.0.0.1", free_port("127.0.0.1"), tell=heard.tell) as service:
        for part, said in (("input()", "Ray's raylet has ended"), ("spawn_main", "its process has ended")) * 3:
            below = wait_for(lambda: processes_below("input()"), "a process below it")
            lost = wait_for(lambda part=part: processes_below(part), part)
            lost[0].kill()
            with pytest.raises(Enough):
                service.watch()
            *_, first, last = heard
            assert first.startswith(f"The service has failed: {said}. Starting it again")
            assert last.startswith("The service answers again")
            assert not running([*lost, *below]), "what was left of it has ended"
        with pytest.raises(StorageInUse), local_service(settings, "127.0.0.1", free_port("127.0.0.1")):
            pass
    assert pauses == [0, 2, 4, 8, 16, 16], "longer from failure to failure, and without an end"
    assert not processes_below("input()", "spawn_main")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [True, False])
def test_a_service_whose_ray_hangs_is_started_again(
    settings: Settings, pauses: list[float], lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers all the while, and none of its processes has ended."""
    heard = Heard()
    said = "Ray's raylet does not answer Ray's GCS" if lost else "Ray has not answered for "
    with local_service(settings, "127.0.0.1", free_port("127.0.0.1"), tell=heard.tell) as service:
        if lost:
            (settings.storage.root / "lost").touch()
            wait_for(lambda: processes_below("input()"), "Ray's raylet")[0].kill()
            with pytest.raises(Enough):
                service.watch()
        else:
            monkeypatch.setattr("chainfed_ray.cluster.pool.ray_watch.PATIENCE_SECONDS", 1.5)
        with pytest.raises(Enough):
            service.watch()
    assert heard[-2].startswith(f"The service has failed: {said}")


@pytest.mark.slow
def test_a_service_that_was_stopped_together_with_its_owner_has_not_failed(
    settings: Settings, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens while a health check waits for its answer, which comes too late."""
    stopped, looks = 0.0, 0

    def answers(_: object) -> bool:
        nonlocal stopped, looks
        looks += 1
        stopped += 48.0 if looks == 2 else 0
        if looks == 3:
            raise Enough
        return looks == 1

    with local_service(settings, "127.0.0.1", free_port("127.0.0.1")) as service:
        monkeypatch.setattr(f"{LOCAL}.monotonic", lambda: monotonic() + stopped)
        monkeypatch.setattr(type(service), "_answers", answers)
        with pytest.raises(Enough):
            service.watch()
    assert not pauses


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "some.name"])
def test_without_a_key_a_service_is_not_for_the_network(
    settings: Settings, pauses: list[float], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{LOCAL}.check_port", lambda host, port: None)  # this machine may not have such an address
    with pytest.raises(InvalidSetting) as refused, local_service(settings, host, 1):
        pass
    assert "`chainfed keys create` makes a key, and --insecure does without" in str(refused.value)
    assert not pauses


@pytest.mark.slow
def test_with_a_key_or_at_the_operators_own_risk_it_is(settings: Settings, pauses: list[float]) -> None:
    heard = Heard()
    with local_service(settings, "0.0.0.0", free_port("0.0.0.0"), tell=heard.tell, insecure=True):
        assert heard == [
            "No key was made, so whoever reaches the service may use it, and run jobs that read this machine's files."
        ]
    keys = KeyStore(settings.storage.database)
    keys.make_key("a", ["admin"])
    keys.close()
    heard = Heard()
    with local_service(settings, "0.0.0.0", free_port("0.0.0.0"), tell=heard.tell):
        assert not heard
    with local_service(settings, "127.0.0.1", free_port("127.0.0.1"), tell=heard.tell, insecure=True):
        assert not heard, "a key was made, so no door is opened by an option"
