"""Runs ``fractaltrain`` in each process of torchrun and writes down the keys of every batch it trained on.

    torchrun --nproc-per-node 2 recorded_run.py FOLDER DEATH ARGUMENTS...

``FOLDER/keys-RANK.jsonl`` gets a line per batch. DEATH is ``EPOCH:STEP``: rank 0 kills itself after saving that
position; ``never`` otherwise.
"""

import json
import os
import signal
import sys
from pathlib import Path

from fractaltrain import train
from fractaltrain.cli import main


def record(folder: Path, death: str) -> None:
    """Wrap what the loop calls; it is otherwise the real one."""
    iterate, save = train.iterate, train.save_checkpoint

    def recording_iterate(batches, start, loading):
        with (folder / f"keys-{os.environ['RANK']}.jsonl").open("a") as file:
            for step, batch in enumerate(iterate(batches, start, loading), start):
                file.write(json.dumps([step, *batch.keys]) + "\n")
                file.flush()
                yield batch

    def deadly_save(where, position, state, keep):
        save(where, position, state, keep)
        if f"{position.epoch}:{position.step}" == death:
            os.kill(os.getpid(), signal.SIGKILL)

    train.iterate, train.save_checkpoint = recording_iterate, deadly_save


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2])
    main(sys.argv[3:])
