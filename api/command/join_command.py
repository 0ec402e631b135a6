"""``chainfed join``: the process at a site. It needs outgoing HTTPS, and no Ray."""

import os
import re
import signal
import sys
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from threading import Event
from typing import Annotated

import typer

from chainfed_ray.api.operator.answers import Json, answer
from chainfed_ray.errors import InvalidSetting
from chainfed_ray.site.agent import Agent, Offer, forget_caches
from chainfed_ray.site.connection import Connection, Withdrawn
from chainfed_ray.site.policy import Policy
from chainfed_ray.site.transcript import Transcript
from chainfed_ray.units import parse_bytes

_KEY = "CHAINFED_SITE_KEY"


def join(
    address: Annotated[str, typer.Argument(help="the service, such as https://chainfed.example.org")],
    site: Annotated[str, typer.Option(help="the name of this site, as its key has it")],
    data: Annotated[Path, typer.Option(help="the folder that jobs may read, and nothing else")],
    memory: Annotated[str | None, typer.Option(help="the most memory that a client may declare, such as 8GiB")] = None,
    split: Annotated[int, typer.Option(min=1, max=1000, help="how many clients to make of a file")] = 1,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="how many turns to take at a time")] = 1,
    key_file: Annotated[Path | None, typer.Option(help=f"a file with the key; by default ${_KEY} has it")] = None,
    cache: Annotated[Path | None, typer.Option(help="the folder for caches; by default one in ~/.cache")] = None,
    ca: Annotated[Path | None, typer.Option("--ca", help="certificates of an authority of one's own, as PEM")] = None,
    allow_models: Annotated[list[str] | None, typer.Option(help="take jobs on these models alone: hf:org/*")] = None,
    max_hours: Annotated[float | None, typer.Option(min=0, help="the most hours of turns for a job")] = None,
    only_private: Annotated[
        float | None, typer.Option(metavar="EPSILON", min=0, help="take jobs with privacy alone, and at most this ε")
    ] = None,
    keep_classes: Annotated[
        bool, typer.Option("--keep-classes", help="do not tell the names of classes; jobs must list them")
    ] = False,
    log: Annotated[Path | None, typer.Option(help="append to this file what is sent, a line of JSON each")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="allow http:// to another machine")] = False,
    as_json: Json = False,
) -> None:
    """Take part in jobs with the rows of this machine, which stay here. Runs until Ctrl-C."""
    policy = Policy(tuple(allow_models) if allow_models else None, _bytes(memory), max_hours, only_private)
    if not data.is_dir():
        raise InvalidSetting("--data", str(data), "a folder that exists")
    scratch = _scratch(cache, address, site)
    offer = Offer(data.resolve(), scratch, split, parallel, not keep_classes, policy)
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_leave, stop))
    with closing(_transcript(log)) as transcript:
        connection = Connection(address, _key(key_file), token_hex(16), transcript, stop, _tell, ca, insecure)
        with closing(connection), suppress(Withdrawn):  # of one that leaves before the service answered
            _run(connection, offer, site, stop)
    answer(as_json, {"status": "left", "site": site}, "The site has left.")


def _run(connection: Connection, offer: Offer, site: str, stop: Event) -> None:
    connection.join(version("chainfed-ray"), site)
    forget_caches(offer.scratch)
    _tell(f"Site {site} has joined, with the files in {offer.data}. Ctrl-C leaves.")
    Agent(connection, offer, stop, _tell).run()


def _leave(stop: Event, number: int, _: object) -> None:
    """Leave cleanly. A service that does not answer may take a minute to be given up, so a second signal ends the process."""
    signal.signal(number, signal.SIG_DFL)
    stop.set()


def _transcript(file: Path | None) -> Transcript:
    try:
        return Transcript(file)
    except OSError as error:
        raise InvalidSetting("--log", str(file), f"a file that can be written ({error})") from None


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _key(file: Path | None) -> str:
    """The site's key. It is never an argument: every user of a machine sees those. The processes that train do not have it."""
    given = os.environ.pop(_KEY, "")
    try:
        key = file.read_text().strip() if file else given.strip()
        if file and file.stat().st_mode & 0o007:
            _tell(f"Others on this machine may read {file}; `chmod 600 {file}` keeps the key to yourself.")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting("--key-file", str(file), f"a file that can be read ({error})") from None
    if not key or not key.isascii() or any(character.isspace() for character in key):
        where = "--key-file" if file else _KEY
        raise InvalidSetting(where, "" if file is None else str(file), "the key that `chainfed sites add` printed")
    return key


def _bytes(text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError:
        raise InvalidSetting("--memory", text or "", "a number of bytes such as 8GiB") from None


def _scratch(cache: Path | None, address: str, site: str) -> Path:
    """The folder for caches. A machine may be a site of several services."""
    service = re.sub("[^a-z0-9.]+", "-", address.lower().partition("://")[2]).strip("-")
    folder = cache or Path.home() / ".cache" / "chainfed-ray" / "sites" / (service or "service") / site
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InvalidSetting("--cache", str(folder), f"a folder that can be made ({error})") from None
    return folder.resolve()
