"""Removes a folder when the process that uses it ends, however that happens."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_folder(prefix: str, place: str | None = None) -> Iterator[Path]:
    """A folder in ``place``, by default that of temporary files. It is removed when the block ends, or this process does."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as folder:
        kept = remove_when_this_process_ends(Path(folder))
        try:
            yield Path(folder)
        finally:
            os.close(kept)


def remove_when_this_process_ends(folder: Path) -> int:
    """Remove ``folder`` when this process exits, even by SIGKILL, or when it closes the descriptor that this returns.

    A detached shell reads from a pipe whose write end only this process holds. When the process exits, the kernel closes that
    end, the read returns, and the shell removes the folder: for some seconds, since other processes that end a little later may
    write there again.
    """
    reading, writing = os.pipe()
    script = 'exec 3<&0; (cat <&3; for _ in 1 2 3 4 5; do rm -rf -- "$0"; sleep 1; done) >/dev/null 2>&1 &'
    subprocess.run(["sh", "-c", script, str(folder)], stdin=reading, check=True, start_new_session=True)
    os.close(reading)
    return writing
