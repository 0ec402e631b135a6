"""Starts a Python program in a fork of a process that has loaded the libraries already: the fork server (``fork_server.py``).

It stands in for Python: ``python -I -S start_forked.py MODULES[@OWNER] PROGRAM ARGUMENT…`` does what
``python PROGRAM ARGUMENT…`` does, in a process that has imported ``MODULES``, named with commas. ``PROGRAM`` may also be
``-c CODE``, as for ``python -P``. The first call starts the server, and later calls find it; it ends with the process
``OWNER``, by default Ray's. This process lives as long as the program and ends with its exit code; the program is ended if
this process is. If the server is ended, its programs go on. Where no server can be had, this process becomes the program,
which then loads its libraries as usual.

It is run once for each process, so it imports little, and nothing of ours.
"""

import json
import os
import socket
import struct
import sys
from zlib import crc32

_START_SECONDS = 120.0  # how long a server may take to load the libraries
_TRIES = 2  # a server that is about to end may take no more requests
STARTED = b"s"
LENGTH, EXIT_CODE = struct.Struct("!I"), struct.Struct("!i")
_CREDENTIALS = struct.Struct("3i")  # ucred of unix(7): process, user, group
_NAMESPACES = ("pid", "mnt")
# Variables that libraries read as they are loaded. Who has others needs another server.
_READ_ONCE = ("HF_", "MALLOC_", "MKL_", "ONEDNN_", "OPENBLAS_", "PYTHON", "PYTORCH", "TORCH", "TRANSFORMERS_")


def main() -> None:
    """Run the program that the command line names, and end with its exit code."""
    loaded, *arguments = sys.argv[1:]
    modules, _, named = loaded.partition("@")
    owner = named or os.environ.get("RAY_RAYLET_PID", "")
    if hasattr(os, "pidfd_open") and owner:
        for _ in range(_TRIES):
            server = None
            try:
                connection, server = _connected(modules, int(owner))
                ask(connection, arguments)
            except OSError:
                if server:
                    break  # it could not load the libraries
                continue
            code = _exit_code(connection)
            # Below this process whoever ends all of Ray's processes finds the server. Another owner waits for this one's end.
            if server and not named:
                os.waitpid(server, 0)
            sys.exit(code)
    options = ["-P"] if arguments[0] == "-c" else []
    os.execv(sys.executable, [sys.executable, *options, *arguments])


def address(modules: str, owner: int) -> str:
    """The address of the server for ``modules`` and the process ``owner``: in Linux's abstract space, so no file is left.

    That space belongs to the network, which containers may share. So the address has this container's namespaces as well.
    """
    read = sorted(item for item in os.environ.items() if item[0].startswith(_READ_ONCE))
    loaded = f"{modules} {sys.executable} {os.stat(__file__).st_mtime_ns} {read}"
    return f"\0chainfed-fork-server/{_namespaces('self')}/{owner}/{crc32(loaded.encode(errors='surrogateescape')):08x}"


def ask(connection: socket.socket, arguments: list[str]) -> None:
    """Ask a server for a process with this process's environment, folder and open standard streams.

    Raises:
        OSError: the server did not start it.
    """
    connection.settimeout(_START_SECONDS)
    document = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    body = json.dumps(document).encode()
    socket.send_fds(connection, [LENGTH.pack(len(body))], [0, 1, 2])
    connection.sendall(body)
    if connection.recv(1) != STARTED:
        raise ConnectionError("the server ended before it started the program")
    connection.settimeout(None)


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end is this user's, in this container: anyone may use a name of the abstract space."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    try:
        return user == os.getuid() and _namespaces(process) == _namespaces("self")
    except OSError:  # it has ended, or is not to be seen from here
        return False


def received(connection: socket.socket, length: int) -> bytes:
    """The next ``length`` bytes.

    Raises:
        OSError: the other end closed before.
    """
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            raise ConnectionError("the other end closed")
        data += more
    return data


def _namespaces(process: int | str) -> str:
    return "/".join(str(os.stat(f"/proc/{process}/ns/{kind}").st_ino) for kind in _NAMESPACES)


def _connected(modules: str, owner: int) -> tuple[socket.socket, int | None]:
    """A connection to the server, and its process if it was started for this one."""
    server = None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address(modules, owner))
    except ConnectionRefusedError:
        server = _start_server(modules, owner)
        connection.connect(address(modules, owner))
    if not is_own(connection):
        raise PermissionError("the server is another user's, or another container's")
    return connection, server


def _start_server(modules: str, owner: int) -> int | None:
    """Start a server that listens already: who asks while it loads waits. None if another process was faster."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address(modules, owner))
        except OSError:
            return None
        listener.listen()
        server = os.fork()
        if server == 0:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1):
                os.dup2(nothing, stream)
            listener.set_inheritable(True)
            command = [sys.executable, "-P", "-m", "chainfed_ray.device.fork_server"]
            command += [str(listener.fileno()), str(owner), modules]
            os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
        return server


def _exit_code(connection: socket.socket) -> int:
    try:
        code: int = EXIT_CODE.unpack(received(connection, EXIT_CODE.size))[0]
    except OSError:
        return 1
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
