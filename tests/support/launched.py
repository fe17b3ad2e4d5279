"""Functions that ``test_distributed`` launches in ranks; ``distributed.launch`` imports them."""

import sys
import time
from pathlib import Path

from fractalshards.errors import FractalError
from fractaltrain import distributed
from fractaltrain.data import shards
from fractaltrain.distributed import join_world, launch, stop_on_signal, stopped_by

distributed._WARNING_SECONDS = 600.0  # ranks of a busy machine may wait for each other, without a word


def save_slowly(folder: Path) -> None:
    """Wait for a signal; rank 0 then saves slowly."""
    seconds = float((folder / "seconds").read_text())
    with join_world() as world, stop_on_signal() as stop:
        (folder / f"ready-{world.rank}").write_text("ready")
        while not world.max(stop.signal):
            time.sleep(0.05)
        if world.main:
            time.sleep(seconds)
            (folder / "saved").touch()
        world.barrier()
        raise stopped_by(world.max(stop.signal))


def open_tars(folder: Path) -> None:
    """Open tars of another program, whose headers only rank 0 may read."""
    with join_world() as world:
        if not world.main:
            del shards.index_tars
        train = shards.open_shards(folder / "theirs", world).train
        (folder / f"labels-{world.rank}").write_text(f"{[train.read(index).label for index in range(4)]}")


if __name__ == "__main__":
    name, path = sys.argv[1:]
    try:
        launch(globals()[name], Path(path), 2)
    except FractalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 1))
