"""Promise: the tests of PostgreSQL and S3 are not left out unnoticed where everything must hold."""

import re
from types import ModuleType

import pytest

from tests import fixtures, postgres, s3
from tests.lacking import without
from tests.project import ROOT


@pytest.mark.parametrize(("server", "fixture"), [(postgres, "postgresql"), (s3, "s3")])
def test_their_fixtures_ask_for_that(server: ModuleType, fixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINFED_CI", "1")
    monkeypatch.setattr(server, "installed", lambda: None)
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as ended:
        next(getattr(fixtures, fixture).__wrapped__())
    assert ended.type is pytest.fail.Exception


def test_a_test_that_lacks_its_server_fails_in_ci_and_is_skipped_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHAINFED_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no server"):
        without("no server")
    monkeypatch.setenv("CHAINFED_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no server"):
        without("no server")
    assert re.search(r"^export CHAINFED_CI=1$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
