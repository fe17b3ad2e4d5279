"""``run_example.py FILE CONSTANTS [N]``: run an example with other constants, and kill it in its N-th checkpoint."""

import importlib.util
import json
import os
import signal
import sys
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def load_example(file: Path, constants: dict[str, Any]) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    return module


def kill_in_save(number: int) -> None:
    """Write half of the N-th checkpoint, then die."""
    save, saves = torch.save, count(1)

    def save_or_die(state: Any, file: Any) -> None:
        save(state, file)
        if next(saves) == number:
            if isinstance(file, Path):
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_or_die


if __name__ == "__main__":
    file, constants, *killed = sys.argv[1:]
    if killed:
        kill_in_save(int(killed[0]))
    load_example(Path(file), json.loads(constants)).main()
