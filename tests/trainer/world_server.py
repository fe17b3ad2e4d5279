"""Runs ``fractaltrain`` in several processes at once, again and again, without importing torch each time.

It reads requests from stdin, a line of JSON each, and answers with a line. A request has ``size`` processes, the
``arguments`` of the command, a ``folder`` for ``out-RANK`` and ``err-RANK``, and perhaps ``signals``: a list of
``[rank, epoch, step, number]``: when that rank has fetched that batch (epoch from 0, step from 1), it sends itself that
signal. With ``record``, ``keys-RANK.jsonl`` in that folder gets a line per batch: its step from 0, and its keys.
``agent``: whether to do what torchrun does, which ends all processes when one has failed; it keeps the store
where they meet in any case, unless ``port`` names another. ``nodes``: machines that they seem to be on. The answer has
the exit ``codes``, negative for a signal, and the ``seconds`` from the first failure to the end of the last process.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for OpenBLAS, too: no thread is there at a fork

# imported once here, for the processes that are forked from this one
import matplotlib.figure  # noqa: F401
import timm  # noqa: F401
import torch.distributed as dist
import torch.utils.tensorboard  # noqa: F401

from fractaltrain import cli, finetune, pretrain, train, world  # noqa: F401

_PATIENCE = 140.0  # seconds; a tenth of it is enough, unless other programs have the cores


def serve() -> None:
    world.available_cores = lambda: 1  # as in ``one_thread`` of conftest.py
    for line in sys.stdin:
        print(json.dumps(run_world(json.loads(line))), flush=True)


def run_world(request: dict) -> dict:
    meeting = None if "port" in request else socket.create_server(("127.0.0.1", 0), backlog=64)
    port = request["port"] if meeting is None else meeting.getsockname()[1]
    processes = {}
    assert len(os.listdir("/proc/self/task")) == 1  # a lock that another thread holds would be held for ever in a fork
    for rank in range(request["size"]):
        for name in ("out", "err"):
            (Path(request["folder"]) / f"{name}-{rank}").touch()  # it may be ended before it opens them
        process = os.fork()
        if process == 0:
            if meeting is not None:
                meeting.close()
            run_rank(rank, port, meeting is not None, request)
        processes[process] = rank
    store = None if meeting is None else store_at(meeting)  # it has a thread, so it comes after the forks
    codes: dict[int, int] = {}
    failed = None
    while processes:
        process, status = os.wait()
        codes[processes.pop(process)] = os.waitstatus_to_exitcode(status)
        if failed is None and status:
            failed = time.monotonic()
            for other in processes if request.get("agent", True) else ():
                os.kill(other, signal.SIGTERM)
    del store  # there until all have ended
    seconds = 0.0 if failed is None else time.monotonic() - failed
    return {"codes": [codes[rank] for rank in range(request["size"])], "seconds": seconds}


def store_at(meeting: socket.socket) -> dist.TCPStore:
    """What the agent of torchrun keeps; whoever connected before waits for it."""
    port = meeting.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach())


def run_rank(rank: int, port: int, agent_store: bool, request: dict) -> None:
    size = str(request["size"])
    local_size = request["size"] // request.get("nodes", 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % local_size)}
    os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": str(local_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if agent_store:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(request["folder"]) / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)  # nothing hangs forever
    code: object = 0
    try:
        send_signals([some for some in request.get("signals", []) if some[0] == rank])
        if request.get("record"):
            record_keys(Path(request["folder"]) / f"keys-{rank}.jsonl")
        cli.main([str(argument) for argument in request["arguments"]])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def send_signals(signals: list) -> None:
    """Wrap what the loop calls; it is otherwise the real one."""
    iterate = train.iterate

    def signalling(batches, start, loading):
        training = len(batches) > 5
        for step, batch in enumerate(iterate(batches, start, loading), start + 1):
            for _, epoch, when, number in signals:
                if training and (batches._epoch, step) == (epoch, when):
                    os.kill(os.getpid(), number)
            yield batch

    train.iterate = signalling


def record_keys(path: Path) -> None:
    """Write down the keys of every batch that the loop gets; it is otherwise the real one."""
    iterate = train.iterate

    def recording(batches, start, loading):
        with path.open("a") as file:
            for step, batch in enumerate(iterate(batches, start, loading), start):
                file.write(json.dumps([step, *batch.keys]) + "\n")
                file.flush()
                yield batch

    train.iterate = recording


if __name__ == "__main__":
    serve()
