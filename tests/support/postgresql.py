"""A PostgreSQL server of its own for tests: on loopback, in a folder that is thrown away."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

_DEBIAN = "/usr/lib/postgresql/*/bin"


class Server:
    """A server that can be stopped and started.

    Attributes:
        url: of its database.
    """

    def __init__(self, folder: Path):
        self._user, self._data, self._log = _unprivileged(), folder / "data", folder / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"postgresql://tuner@127.0.0.1:{self._port}/postgres"
        if self._user is not None:
            shutil.chown(folder, self._user.pw_name)
        program = _program("initdb")
        _run(self._user, program, "-D", self._data, "-U", "tuner", "--auth=trust", "-E", "UTF8")

    def start(self) -> None:
        """Returns when it answers."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self._control("-l", self._log, "-o", options, "-w", "-t", "60", "start")

    def stop(self) -> None:
        """Every connection is dropped."""
        self._control("-m", "immediate", "stop")

    def _control(self, *command) -> None:
        _run(self._user, _program("pg_ctl"), "-D", self._data, *command)


@contextmanager
def serve() -> Iterator[Server]:
    """Start a server, which is stopped at the end.

    Raises:
        FileNotFoundError: PostgreSQL is not installed (Debian: apt-get install postgresql).
    """
    # Not in pytest's folders: those are root's alone, and the server refuses root.
    with tempfile.TemporaryDirectory(prefix="numflash-postgresql-") as folder:
        server = Server(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _program(name: str) -> str:
    """A program of PostgreSQL, which Debian keeps off the PATH."""
    found = shutil.which(name) or next(iter(sorted(glob(f"{_DEBIAN}/{name}"), reverse=True)), None)
    if found is None:
        raise FileNotFoundError(
            f"{name} of PostgreSQL is not installed: apt-get install postgresql"
        )
    return found


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom to run the server as: it refuses root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _run(user: pwd.struct_passwd | None, *command) -> None:
    """Run a command as a user; its output is shown if it fails."""
    names = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with open(os.devnull) as nothing:
        done = subprocess.run(
            list(map(str, command)),
            stdin=nothing,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            **names,
        )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout}")
