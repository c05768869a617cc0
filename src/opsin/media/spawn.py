"""Start a media worker; both ends of its socket speak ``opsin.media.wire``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from opsin.config import MediaConfig

START_TIMEOUT_S = 60.0

# Threads are of no use to a worker. glibc gives a picture's memory back to the kernel as soon as it is freed, and the
# page faults of the next picture then cost as much as decoding it; these thresholds keep 128 MiB for it.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**27),
}

# Workers search for modules exactly where this process does, whatever set its path.
_BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[4:]; from opsin.media import worker; "
    "worker.main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))"
)


def start_worker(config: MediaConfig) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A worker process and our end of its socket. Its first message says that it is ready."""
    # Decoded twice over (RGBA and RGB at 4 bytes a pixel), turned and resized, with room for the libraries.
    max_memory_bytes = 16 * config.max_image_pixels + 2**31
    ours, theirs = socket.socketpair()
    with theirs:
        longest_s = max(config.media_decode_timeout_s, config.video_decode_timeout_s)
        arguments = [str(theirs.fileno()), str(longest_s), str(max_memory_bytes)]
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *arguments, *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C in a terminal is for the engine to handle
            env={**os.environ, **_ENVIRONMENT},
        )
    ours.settimeout(START_TIMEOUT_S)  # messages are small; a worker that stops inside one is broken
    return process, ours
