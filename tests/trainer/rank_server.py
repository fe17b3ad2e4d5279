"""Runs ``fractaltrain`` as several ranks, again and again, without importing PyTorch each time.

Reads requests from stdin, one JSON object a line, and answers each with one. A request has the number of ranks
(``size``), the ``arguments`` of the command, a ``folder`` for the files ``out-RANK`` and ``err-RANK``, and optionally
``nodes``, the number of machines to simulate, and ``signals``: a list of ``[rank, call, number]``: that rank sends
itself that signal when it takes its step number ``call``, counted from 1 in this process. ``keys-RANK.jsonl`` gets the
sample keys of every training batch. The answer has the exit ``codes``, negative for a signal.
"""

import faulthandler
import json
import os
import sys
import traceback
from itertools import count
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # no thread exists at a fork, not even of OpenBLAS

import matplotlib.figure  # noqa: F401  # imported once here, for all ranks
import timm  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

from fractaltrain import cli, distributed, finetune, pretrain, train  # noqa: F401

_LIMIT = 140.0  # seconds


def run_ranks(request: dict) -> dict:
    ranks = {}
    for rank in range(request["size"]):
        process = os.fork()
        if process == 0:
            run_rank(rank, request)
        ranks[process] = rank
    codes = {}
    while len(codes) < len(ranks):
        process, status = os.wait()
        codes[ranks[process]] = os.waitstatus_to_exitcode(status)
    return {"codes": [codes[rank] for rank in range(request["size"])]}


def run_rank(rank: int, request: dict) -> None:
    folder, size = Path(request["folder"]), request["size"]
    local_size = size // request.get("nodes", 1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"LOCAL_RANK": str(rank % local_size), "LOCAL_WORLD_SIZE": str(local_size)}
    os.environ |= {"FRACTALTRAIN_STORE": (folder / "store").as_uri()}
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    faulthandler.dump_traceback_later(_LIMIT, exit=True)
    code: object = 0
    try:
        record_steps(
            folder / f"keys-{rank}.jsonl", {call: n for who, call, n in request.get("signals", []) if who == rank}
        )
        cli.main(request["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def record_steps(path: Path, signals: dict[int, int]) -> None:
    """Write down the keys of every batch that the loop trains on, and send signals meanwhile."""
    train_batch, calls = train.train_batch, count(1)

    def recording(batch, *arguments):
        if number := signals.get(next(calls)):
            os.kill(os.getpid(), number)
        with path.open("a") as file:
            file.write(json.dumps(batch.keys) + "\n")
        return train_batch(batch, *arguments)

    train.train_batch = recording


if __name__ == "__main__":
    distributed.available_cores = lambda: 1
    distributed._WARNING_SECONDS = _LIMIT  # no warning on a busy machine
    for line in sys.stdin:
        print(json.dumps(run_ranks(json.loads(line))), flush=True)
