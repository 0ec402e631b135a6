"""``chainfed join``, as people start it at a site."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chainfed_ray.api.command.local_service import free_port

pytestmark = pytest.mark.slow


def test_the_log_is_for_nobody_else_and_ctrl_c_ends_a_site_without_a_service(tmp_path: Path) -> None:
    (key := tmp_path / "key").write_text("secret")
    key.chmod(0o644)
    (cache := tmp_path / "cache").mkdir()
    command = [sys.executable, "-c", "from chainfed_ray.api.command.entry import main; main()", "join"]
    command += [f"http://127.0.0.1:{free_port('127.0.0.1')}", "--site", "a", "--data", str(tmp_path)]
    command += ["--key-file", str(key), "--cache", str(cache), "--log", str(tmp_path / "log")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert f"chmod 600 {key}" in process.stderr.readline()
    assert "waiting for it" in process.stderr.readline()
    assert (tmp_path / "log").read_text()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    os.kill(process.pid, signal.SIGINT)
    words, _ = process.communicate(timeout=30)
    assert (process.returncode, words) == (0, "The site has left.\n")
