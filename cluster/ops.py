"""DeepSpeed's libraries for reading and writing disks, compiled in a step of their own: never while a job waits.

They belong to one version of Python, torch and DeepSpeed, and have a folder for each. A compilation that was killed leaves a
``lock`` for which DeepSpeed would wait for ever. Whoever holds our own lock, which the kernel takes back, knows it is stale.
"""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from chainfed_ray.errors import InvalidSetting, OpsNotBuilt
from chainfed_ray.offload_ops import OPS

_BUILT, _OURS = "built", "building"


def ops_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the libraries of these versions are: in ``CHAINFED_EXTENSIONS``, by default the user's cache.

    Raises:
        InvalidSetting: the setting is no absolute path, or the user has no home.
    """
    named = environment.get("CHAINFED_EXTENSIONS")
    if named and not Path(named).is_absolute():
        raise InvalidSetting("CHAINFED_EXTENSIONS", named, "an absolute path")
    cache = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME') or '/tmp'}/.cache"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Path(named or f"{cache}/chainfed") / f"{python}-torch{version('torch')}-deepspeed{version('deepspeed')}"


def are_built(folder: Path) -> bool:
    """Whether all of them are there, whole."""
    return (folder / _BUILT).exists() and all((folder / name / f"{name}.so").exists() for name in OPS)


def stale_locks(folder: Path) -> list[Path]:
    """The locks of compilations that are over, and did not end well."""
    locks = [folder / name / "lock" for name in OPS]
    found = [lock for lock in locks if lock.exists()]
    if not found:
        return []
    try:
        with _alone(folder, wait=False) as alone:
            return found if alone else []
    except OSError:  # it cannot be written to, so nobody compiles there
        return found


def build_ops(folder: Path) -> None:
    """Compile them, unless they are there; it takes minutes. One process at a time, another waits for it.

    Raises:
        OpsNotBuilt: the compiler failed, or there is none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _OURS).touch()
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}; CHAINFED_EXTENSIONS may name a folder that can be written to"
        raise OpsNotBuilt(str(folder), reason) from error
    with _alone(folder, wait=True):
        if are_built(folder):
            return
        for lock in (folder / name / "lock" for name in OPS):
            lock.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", "from chainfed_ray.cluster.ops import compile_here; compile_here()"],
            env={
                **os.environ,
                "DS_ACCELERATOR": "cpu",
                "TORCH_EXTENSIONS_DIR": str(folder),
                # Where pip puts ninja, also if nobody activated the environment.
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            },
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OpsNotBuilt(str(folder), _last_words(done.stderr + done.stdout) or f"exit code {done.returncode}")
        (folder / _BUILT).write_text("")


def _last_words(said: str) -> str:
    """The first line that tells of an error, or the last line: what follows an error tells that there was one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|not found", line)]
    return (errors[:1] or lines[-1:] or [""])[0].rstrip(".")


def compile_here() -> None:
    """Compile and load them in this process, which is made for it.

    For any machine of this kind, not only for one with this processor: an image is built elsewhere, and what they do is wait
    for disks.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    OpBuilder.cpu_arch = lambda builder: ""
    OpBuilder.simd_width = lambda builder: "-D__SCALAR__"
    AsyncIOBuilder().load(verbose=False)


@contextmanager
def _alone(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether nobody else compiles into ``folder`` for as long as the block runs."""
    with (folder / _OURS).open("w") as ours:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
