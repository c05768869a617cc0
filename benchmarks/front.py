"""CPU seconds that the HTTP server spends on a stream, its engine not counted.

    python benchmarks/front.py --streams 200 --clients 16

Starts ``opsin serve demo`` and streams 64-token answers over a connection each. The server's process is measured by the
kernel (user and system time of all its threads); the engine and the decoders are other processes. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time
from pathlib import Path

from soak import Seen, Server, canary, serving


async def run(server: Server, streams: int, clients: int) -> dict[str, float]:
    """Stream answers, ``clients`` of them at a time."""
    seen = Seen()
    numbers = itertools.count()

    async def client(last: int) -> None:
        while next(numbers) < last:
            await canary(server, seen)

    await asyncio.gather(*(client(clients) for _ in range(clients)))  # warm
    numbers, seen = itertools.count(), Seen()
    cpu_s, begun = _cpu_s(server.pid), time.perf_counter()
    await asyncio.gather(*(client(streams) for _ in range(clients)))
    assert not seen.errors, seen.errors[0]
    return {
        "streams": streams,
        "clients": clients,
        "seconds": round(time.perf_counter() - begun, 2),
        "events_per_stream": round(1 + len(seen.gaps_s) / streams, 1),
        "front_cpu_ms_per_stream": round(1e3 * (_cpu_s(server.pid) - cpu_s) / streams, 2),
    }


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    with serving() as server:
        print(json.dumps(asyncio.run(run(server, args.streams, args.clients)), indent=2))


if __name__ == "__main__":
    main()
