"""Pairs of ranks that talk and end, as many and with the status that is told; prints how they ended as JSON. No test.

Before each ends, all its threads but the main one are starved, as on a machine with more to do than it can.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import torch
import torch.distributed.tensor

from medbridge.train.parallel import joined
from medbridge.train.ranks import Ranks

kept: list[Ranks] = []  # to the very end, as the command line keeps them


def talk(rank: int, port: int, status: int) -> None:
    os.environ.update(
        WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    with joined() as ranks:
        kept.append(ranks)
        for _ in range(5):
            ranks.gather(list(range(100)))
        for thread in map(int, os.listdir("/proc/self/task")):
            os.sched_setaffinity(thread, {cores[rank % len(cores)]})
            if thread != os.getpid():
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        ranks.share(int)
        if status:
            sys.exit(status)


def main() -> None:
    torch.set_num_threads(1)
    statuses = []
    for _ in range(int(sys.argv[1])):
        children: list[int] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(2):
            children.append(os.fork())
            if not children[-1]:
                talk(rank, port, int(sys.argv[2]))
                return
        statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
