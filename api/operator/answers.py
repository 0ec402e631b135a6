"""What commands read from standard input, and their answers: as one JSON object for programs, or as text for people."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from chainfed_ray.errors import InvalidJob

_LEAST_WIDTH = 80  # columns. With fewer, tables would leave out figures; a narrow terminal breaks the lines
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]


def answer(as_json: bool, document: dict[str, Any], *parts: RenderableType) -> None:
    """Print the answer on standard output: ``document`` as JSON for programs, or ``parts`` for people."""
    output = sys.__stdout__  # local_ray redirects sys.stdout, to keep Ray's own output out of the answer
    if as_json:
        print(json.dumps(document), file=output, flush=True)
        return
    console = Console(file=output, highlight=False, markup=False)  # a path or a class may have brackets in its name
    console.width = max(console.width, _LEAST_WIDTH)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def standard_input() -> str:
    """All of the standard input.

    Raises:
        InvalidJob: it is not text in UTF-8.
    """
    given = sys.stdin.buffer.read()
    try:
        return given.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"text in UTF-8 ({error.reason} at byte {error.start})"
        raise InvalidJob.at("(standard input)", given[:40], where) from None
