"""Removes a folder when the process that uses it ends, however that happens."""

import os
import subprocess
from pathlib import Path


def remove_when_this_process_ends(folder: Path) -> None:
    """Remove ``folder`` when this process exits, even by SIGKILL.

    A detached shell reads from a pipe whose write end only this process holds. When the process exits, the kernel closes that
    end, the read returns, and the shell removes the folder.
    """
    reading, _ = os.pipe()
    script = 'exec 3<&0; (cat <&3; rm -rf -- "$0") >/dev/null 2>&1 &'
    subprocess.run(["sh", "-c", script, str(folder)], stdin=reading, check=True, start_new_session=True)
    os.close(reading)
