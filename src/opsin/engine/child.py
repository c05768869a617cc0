"""Starting an engine's process. Next to nothing is imported here, so that a server can do it before all else."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Self

# The process searches for modules exactly where this one does, whatever set its path.
BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[2:]; from opsin.engine import process; sys.exit(process.main(int(sys.argv[1])))"
)


class ChildProcess:
    """An engine's process, which waits to be told what to load, and meanwhile imports torch for seconds.

    As a context it is ended on the way out, however far it is.

    Attributes:
        connection: our end of the socket; see ``engine.messages``.
    """

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal is for the front to handle
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
