"""PostgreSQL's own programs: ``pg_dump`` writes a copy of a database, and ``pg_restore`` with ``psql`` puts it back."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from sqlalchemy.engine import URL

from chainfed_ray.errors import InvalidSetting


def run_program(program: str, *arguments: str, url: URL) -> None:
    """Run a program for the database at ``url``.

    Raises:
        InvalidSetting: it fails, or is not installed.
    """
    with _started(program, f"--dbname={_address(url)}", *arguments, url=url, stdout=subprocess.DEVNULL) as running:
        _end(running, program, url)


def put_back(dump: Path, url: URL, first: str, last: str) -> None:
    """Execute ``first``, what ``dump`` has, and ``last`` in one transaction of the database at ``url``.

    The statements go from one program to the other and through no file: a cut would leave it, with its hashes of keys, and a
    disk that is full would not take it. Whatever ends before all of it was sent changes nothing, as nobody commits then.

    Raises:
        InvalidSetting: a program fails, or is not installed.
    """
    options = (f"--dbname={_address(url)}", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file=-")
    with _started("psql", *options, url=url, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as psql:
        _send(psql.stdin, f"begin;\n{first}")
        with _started(
            "pg_restore", "--clean", "--if-exists", "--no-owner", "--file=-", str(dump), url=url, stdout=psql.stdin
        ) as reading:
            _, said = reading.communicate()
        if reading.returncode == 0:
            _send(psql.stdin, f"{last}commit;\n")
        _end(psql, "psql", url)  # first: pg_restore fails as well if nobody reads what it writes
        _check(reading.returncode, said, "pg_restore", url)


def _started(program: str, *arguments: str, url: URL, **streams: Any) -> subprocess.Popen[str]:
    """A program, whose arguments others see: the password is not among them."""
    found = shutil.which(program) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{program}")), default=None)
    if found is None:
        expected = f"one of a machine with {program} (Debian: postgresql-client)"
        raise InvalidSetting("CHAINFED_DATABASE", url.render_as_string(), expected)
    secret = {"PGPASSWORD": str(url.password)} if url.password else {}
    environment = {**os.environ, **secret}
    return subprocess.Popen([found, *arguments], env=environment, stderr=subprocess.PIPE, text=True, **streams)


def _address(url: URL) -> str:
    return url.set(drivername="postgresql", password=None).render_as_string()


def _send(stream: IO[str] | None, statements: str) -> None:
    assert stream
    with suppress(BrokenPipeError):  # who has ended says why
        stream.write(statements)
        stream.flush()


def _end(running: subprocess.Popen[str], program: str, url: URL) -> None:
    _, said = running.communicate()
    _check(running.returncode, said, program, url)


def _check(code: int, said: str, program: str, url: URL) -> None:
    if code:
        expected = f"one that {program} accepts ({said.strip()[:500]})"
        raise InvalidSetting("CHAINFED_DATABASE", url.render_as_string(), expected)
