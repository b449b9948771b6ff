"""A PostgreSQL server of its own for tests: on loopback, in a folder that is thrown away."""

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

_DEBIAN = "/usr/lib/postgresql/*/bin"


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Start a server; the URL of its database. It is stopped at the end.

    Raises:
        FileNotFoundError: PostgreSQL is not installed (Debian: apt-get install postgresql).
    """
    user = _unprivileged()
    data, log = folder / "data", folder / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if user is not None:
        for each in (folder, *folder.parents):
            if each == Path("/tmp") or each == Path("/"):
                break
            each.chmod(0o755)
        shutil.chown(folder, user.pw_name)
    _run(user, _program("initdb"), "-D", data, "-U", "tuner", "--auth=trust", "-E", "UTF8")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
    control = _program("pg_ctl")
    _run(user, control, "-D", data, "-l", log, "-o", options, "-w", "-t", "60", "start")
    try:
        yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
    finally:
        _run(user, control, "-D", data, "-m", "immediate", "stop")


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
