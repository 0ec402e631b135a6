"""Compiles DeepSpeed's libraries for reading and writing disks, in a separate step, so that no job waits for a compiler.

Each combination of versions of Python, torch and DeepSpeed has a folder of its own. The libraries are compiled in a temporary
folder and moved when they are complete: what a killed compilation leaves is never loaded, and blocks nothing.
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

from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.cluster.offload.libraries import OPS, library
from chainfed_ray.errors import OpsNotBuilt

_TEMPORARY = "compiling-"


def ops_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of the libraries for the installed versions: in ``CHAINFED_EXTENSIONS``, by default in the user's cache.

    Raises:
        InvalidSetting: ``CHAINFED_EXTENSIONS`` is not an absolute path.
    """
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    versions = f"{python}-torch{version('torch')}-deepspeed{version('deepspeed')}"
    return cache_folder("CHAINFED_EXTENSIONS", environment=environment) / versions


def are_built(folder: Path) -> bool:
    """True if ``folder`` has all the libraries."""
    return all(library(name, folder).exists() for name in OPS)


def build_ops(folder: Path) -> None:
    """Compile the libraries into ``folder``, unless they are there. It takes a minute or two.

    One process compiles at a time; another one waits until it has finished.

    Raises:
        OpsNotBuilt: the compiler failed or is missing, or the folder cannot be written to.
    """
    if are_built(folder):  # check before writing: in the container image the folder is read-only
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if are_built(folder):  # another process compiled them while this one waited
                return
            for leftover in folder.glob(f"{_TEMPORARY}*"):  # from a compilation that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            with TemporaryDirectory(prefix=_TEMPORARY, dir=folder, ignore_cleanup_errors=True) as temporary:
                _compile(Path(temporary), folder)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}; CHAINFED_EXTENSIONS may name a folder that can be written to"
        raise OpsNotBuilt(str(folder), reason) from error


def _compile(temporary: Path, folder: Path) -> None:
    """Compile the libraries in ``temporary``, in a process of its own, and move them into ``folder``."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from chainfed_ray.cluster.offload.build import compile_here; compile_here()"],
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(temporary),
            # pip installs ninja beside Python, where PATH has it only if the environment is activated.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise OpsNotBuilt(str(folder), _error_line(done.stderr + done.stdout) or f"exit code {done.returncode}")
    for name in OPS:
        (temporary / name / f"{name}.so").replace(library(name, folder))


def _error_line(output: str) -> str:
    """The line of a compiler's output that says what went wrong: the first one with an error, or else the last line.

    The first one, because later lines only say that there was an error.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|not found", line)]
    return (errors[:1] or lines[-1:] or [""])[0].rstrip(".")


def compile_here() -> None:
    """Compile the libraries in the folder that ``TORCH_EXTENSIONS_DIR`` names, and load them. It needs a process of its own.

    The code runs on any processor of this architecture, because images are built on other machines; speed does not matter for
    code that waits for disks. Symbols for debuggers are left out: they would double the time to compile.
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
    """Copy DeepSpeed's sources, and add ``#pragma once`` to each header: they have no include guards."""
    shutil.copytree(theirs, ours)
    for header in ours.rglob("*.h"):
        header.write_text(f"#pragma once\n{header.read_text()}")


def _join_sources(builder: Any, folder: Path) -> None:
    """Let ``builder`` compile a single source that includes its others: torch's headers take half a minute per source.

    Sources in ``common`` are compiled separately: they do not include torch, and define names that other sources define too.
    """
    apart = [source for source in builder.sources() if "/common/" in source]
    included = [f'#include "{source}"\n' for source in builder.sources() if source not in apart]
    joined = folder / f"{builder.name}.cpp"
    joined.write_text("".join(included))
    builder.sources = lambda: [*apart, joined.name]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, so that one process compiles at a time. The kernel frees it when the process dies."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
