"""Options of the commands that ask a service."""

from pathlib import Path
from typing import Annotated

import typer

JobId = Annotated[str, typer.Argument(help="the id of a job, from `chainfed list`")]
Address = Annotated[str, typer.Option(envvar="CHAINFED_ADDRESS", help="the address of the service")]
KeyFile = Annotated[Path | None, typer.Option(help="a file with the API key; by default CHAINFED_API_KEY has it")]
ADDRESS = "http://127.0.0.1:8000"
