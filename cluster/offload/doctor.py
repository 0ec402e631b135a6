"""Checks if DeepSpeed can evaluate on this machine, and says how to get what is missing.

The check comes first, because DeepSpeed aborts the whole process if memory cannot be locked or a file is shorter than expected.
"""

import ctypes
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chainfed_ray.cluster.offload.build import are_built, ops_folder
from chainfed_ray.device.peak import status_line
from chainfed_ray.units import format_bytes

_INCLUDE = (Path("/usr/include"), Path("/usr/local/include"))
_IN_MEMORY = ("tmpfs", "ramfs")
_IPC_LOCK = 14  # the bit of the capability, in linux/capability.h
# What to require if the model is not known yet. RoBERTa-large locks 33 MiB of memory, and takes 1.2 GiB of disk.
_USUAL_LOCK, _USUAL_DISK = 64 * 2**20, 2 * 2**30


@dataclass(frozen=True)
class Machine:
    """What a machine has that DeepSpeed may need. Paths are None if nothing was found."""

    compiler: str | None
    ninja: str | None
    header: str | None  # libaio's header
    library: bool  # libaio can be loaded
    ops: Path  # the folder of DeepSpeed's compiled libraries
    built: bool  # the compiled libraries are there
    lockable: int | None  # bytes of memory that a process may lock; None if there is no limit
    scratch: Path
    direct: bool  # files in scratch can be read and written past the page cache (O_DIRECT)
    free_disk: int  # bytes


@dataclass(frozen=True)
class Finding:
    """The result of one check: ``ok``, what was ``found``, and the ``remedy`` if it is not ok.

    ``needed`` is false for what this machine can do without, such as a compiler when the libraries are compiled.
    """

    name: str
    ok: bool
    found: str
    remedy: str | None = None
    needed: bool = True

    def document(self) -> dict[str, object]:
        """The finding as JSON."""
        return {
            "name": self.name,
            "ok": self.ok,
            "needed": self.needed,
            "found": self.found,
            "remedy": self.remedy,
        }


def look(
    scratch: Path,
    environment: Mapping[str, str] = os.environ,
    include: Sequence[Path] = _INCLUDE,
    library: str = "libaio.so.1",
) -> Machine:
    """Examine this machine. ``scratch`` is the folder where a model's layers would be stored.

    Raises:
        InvalidSetting: ``CHAINFED_EXTENSIONS`` is invalid.
    """
    ops = ops_folder(environment)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    named = [Path(folder) for folder in environment.get("CPATH", "").split(os.pathsep) if folder]
    headers = [folder / "libaio.h" for folder in (*named, *include)]
    return Machine(
        compiler=shutil.which(environment.get("CXX") or "c++", path=environment.get("PATH", "")),
        ninja=shutil.which("ninja", path=path),
        header=next((str(header) for header in headers if header.exists()), None),
        library=_loads(library),
        ops=ops,
        built=are_built(ops),
        lockable=_lockable(),
        scratch=scratch,
        direct=_is_direct(_existing(scratch)),
        free_disk=shutil.disk_usage(_existing(scratch)).free,
    )


def findings(machine: Machine, lock: int = _USUAL_LOCK, disk: int = _USUAL_DISK) -> list[Finding]:
    """The findings for an evaluation by DeepSpeed that locks ``lock`` bytes of memory and stores ``disk`` bytes on disk."""
    lockable, built = machine.lockable, machine.built
    return [
        Finding(
            "libaio",
            machine.library,
            "it can be loaded" if machine.library else "it cannot be loaded",
            "apt-get install -y libaio1 (libaio1t64 on newer systems)",
        ),
        Finding(
            "compiled libraries",
            built,
            str(machine.ops) if built else f"they are not in {machine.ops}",
            "chainfed doctor --build",
        ),
        Finding(
            "locked memory",
            lockable is None or lockable >= lock,
            "without limit" if lockable is None else f"{format_bytes(lockable)} of the {format_bytes(lock)} needed",
            "ulimit -l unlimited, or memlock in /etc/security/limits.conf; docker run --ulimit memlock=-1",
        ),
        Finding(
            "disk",
            machine.free_disk >= disk,
            f"{format_bytes(machine.free_disk)} free in {machine.scratch}, {format_bytes(disk)} needed",
            "set CHAINFED_SCRATCH to a folder on a larger disk",
        ),
        Finding(
            "direct file access",
            machine.direct,
            f"{'possible' if machine.direct else 'not possible'} in {machine.scratch}",
            "set CHAINFED_SCRATCH to a folder on a disk, not in memory",
        ),
        Finding(
            "C++ compiler",
            machine.compiler is not None,
            machine.compiler or "no c++ in PATH",
            "apt-get install -y g++",
            needed=not built,
        ),
        Finding(
            "ninja",
            machine.ninja is not None,
            machine.ninja or "no ninja in PATH",
            "pip install ninja",
            needed=not built,
        ),
        Finding(
            "libaio's header",
            machine.header is not None,
            machine.header or "no libaio.h",
            "apt-get install -y libaio-dev",
            needed=not built,
        ),
    ]


def is_possible(found: Sequence[Finding]) -> bool:
    """True if DeepSpeed can evaluate on the machine with these findings."""
    return all(finding.ok or not finding.needed for finding in found)


def why_not(machine: Machine, lock: int, disk: int) -> str | None:
    """One sentence on why DeepSpeed cannot evaluate here, or None if it can."""
    for finding in findings(machine, lock, disk):
        if finding.needed and not finding.ok:
            return f"{finding.name}: {finding.found}; {finding.remedy}"
    return None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _lockable() -> int | None:
    """The bytes that this process may lock; None if there is no limit. A process may raise its soft limit to the hard one."""
    if int(status_line("CapEff"), 16) >> _IPC_LOCK & 1:
        return None
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if most == resource.RLIM_INFINITY else most


def _is_direct(folder: Path) -> bool:
    """True if ``folder`` is on a disk and files in it can be opened with O_DIRECT, as DeepSpeed opens them."""
    if _file_system(folder) in _IN_MEMORY:  # some kernels allow O_DIRECT even there
        return False
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _file_system(folder: Path) -> str:
    """The kind of file system that ``folder`` is on: the deepest mount above it and, if two share a place, the later one."""
    mounted = (line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines())
    within = [(place, kind) for place, kind in mounted if folder.resolve().is_relative_to(_unescaped(place))]
    return max(reversed(within), key=lambda found: len(found[0]))[1]


def _unescaped(place: str) -> str:
    r"""The path that the kernel lists with escapes: it writes ``\040`` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
