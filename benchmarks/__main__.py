"""``python -m benchmarks NAME``."""

import typer

from benchmarks import memory

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="What is published, measured."
)
app.command("memory")(memory.main)


@app.callback()
def benchmarks() -> None:
    """What is published, measured."""


app()
