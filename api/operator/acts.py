"""What an operator does with a command, put into the audit log."""

import getpass
import os

from chainfed_ray.cluster.storage import database_url


def put_down(command: str, target: str, database: str | None = None) -> None:
    """Put into the audit log what the operator did, under the name of the account. The database's tables stay as they are.

    It is the ``database`` at a URL, or the one that the environment names.
    """
    from chainfed_ray.cluster.access.audit import Act, note_once  # other commands start sooner without SQLAlchemy

    note_once(
        database or database_url(), Act(None, None, command, target, f"{_account()} at the service's machine", "done")
    )


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, a user may have no name
        return str(os.getuid())
