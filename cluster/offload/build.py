"""DeepSpeed's libraries for reading and writing disks, compiled in a step of their own: never while a job waits.

They belong to one version of Python, torch and DeepSpeed, and have a folder for each. They are compiled in a temporary folder
and moved to their place when they are whole: nothing that a killed compilation left is taken for a library, or waited for.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chainfed_ray.cluster.offload.libraries import OPS, library
from chainfed_ray.errors import InvalidSetting, OpsNotBuilt

_TEMPORARY = "compiling-"


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
    """Whether all of them are there."""
    return all(library(name, folder).exists() for name in OPS)


def build_ops(folder: Path) -> None:
    """Compile them, unless they are there; it takes a minute or two. One process at a time, another waits for it.

    Raises:
        OpsNotBuilt: the compiler failed, or there is none.
    """
    if are_built(folder):  # perhaps where nothing can be written, as in the image
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if are_built(folder):  # by the one that had the lock before
                return
            for left in folder.glob(f"{_TEMPORARY}*"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
            with TemporaryDirectory(prefix=_TEMPORARY, dir=folder, ignore_cleanup_errors=True) as temporary:
                _compile(Path(temporary), folder)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}; CHAINFED_EXTENSIONS may name a folder that can be written to"
        raise OpsNotBuilt(str(folder), reason) from error


def _compile(temporary: Path, folder: Path) -> None:
    """Compile them in ``temporary``, in a process of their own, and move them into ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", "from chainfed_ray.cluster.offload.build import compile_here; compile_here()"],
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(temporary),
            # Where pip puts ninja, also if nobody activated the environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise OpsNotBuilt(str(folder), _last_words(done.stderr + done.stdout) or f"exit code {done.returncode}")
    for name in OPS:
        (temporary / name / f"{name}.so").replace(library(name, folder))


def _last_words(said: str) -> str:
    """The first line that tells of an error, or the last line: what follows an error tells that there was one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|not found", line)]
    return (errors[:1] or lines[-1:] or [""])[0].rstrip(".")


def compile_here() -> None:
    """Compile and load them in this process, which is made for it, in the folder that ``TORCH_EXTENSIONS_DIR`` names.

    For any machine of this kind, not only for one with this processor: an image is built elsewhere, and what they do is wait
    for disks. Without what a debugger needs, which would take as long again.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder, PinMemoryBuilder
    from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

    builders = PinMemoryBuilder(), AsyncIOBuilder()  # in the order of OPS
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    _copy_sources(Path(builders[0].deepspeed_src_path("csrc")), folder / "csrc")
    OpBuilder.deepspeed_src_path = lambda builder, path: str(folder / path)
    CPUOpBuilder.cxx_args = lambda builder: ["-fopenmp", "-D__SCALAR__"]
    for builder in builders:
        _join_sources(builder, folder)
        builder.load(verbose=False)


def _copy_sources(theirs: Path, ours: Path) -> None:
    """Copy DeepSpeed's sources, and let each header be read once in a compilation: theirs do not see to that."""
    shutil.copytree(theirs, ours)
    for header in ours.rglob("*.h"):
        header.write_text(f"#pragma once\n{header.read_text()}")


def _join_sources(builder: Any, folder: Path) -> None:
    """Let ``builder`` compile one source that includes its others: each reads torch's headers, which takes half a minute.

    Those in ``common`` stay apart. They read nothing of torch's, and have names of their own that are also names elsewhere.
    """
    apart = [source for source in builder.sources() if "/common/" in source]
    included = [f'#include "{source}"\n' for source in builder.sources() if source not in apart]
    joined = folder / f"{builder.name}.cpp"
    joined.write_text("".join(included))
    builder.sources = lambda: [*apart, joined.name]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else compiles into ``folder`` for as long as the block runs. The kernel takes the lock back from whoever dies."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
