"""``fractaltrain`` as one of several ranks, in a process of a fork server that has imported this module."""

import faulthandler
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import count
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # no thread exists at a fork, not even of OpenBLAS

from fractaltrain import cli, distributed, train

_MODULES = "matplotlib.figure timm torch.utils.tensorboard fractaltrain.finetune fractaltrain.pretrain"
for _module in _MODULES.split():
    import_module(_module)  # here once, instead of in every rank

_LIMIT = 140.0  # seconds


def run_rank(
    rank: int, size: int, folder: Path, arguments: list[str], nodes: int, signals: Sequence[tuple[int, int, int]]
) -> None:
    """Run the command as on one of ``nodes`` machines, and write what it prints into ``out-RANK`` and ``err-RANK``.

    ``signals`` are rank, number of a step, counted from 1, and the signal that the rank sends itself before this step.
    """
    local_size = size // nodes
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"LOCAL_RANK": str(rank % local_size), "LOCAL_WORLD_SIZE": str(local_size)}
    os.environ |= {"FRACTALTRAIN_STORE": f"file://{folder}/store"}
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    faulthandler.dump_traceback_later(_LIMIT, exit=True)
    distributed.available_cores = lambda: 1
    distributed._WARNING_SECONDS = _LIMIT  # no warning on a busy machine
    record_steps(folder / f"keys-{rank}.jsonl", {step: number for who, step, number in signals if who == rank})
    cli.main(arguments)


def record_steps(path: Path, signals: dict[int, int]) -> None:
    """Write the keys of every batch that the loop trains on into a file, and send signals meanwhile."""
    train_batch, calls = train.train_batch, count(1)

    def recording(batch, *arguments):
        if number := signals.get(next(calls)):
            os.kill(os.getpid(), number)
        with path.open("a") as file:
            file.write(json.dumps(batch.keys) + "\n")
        return train_batch(batch, *arguments)

    train.train_batch = recording
