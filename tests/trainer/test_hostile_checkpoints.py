"""Files that are called checkpoints and are none, whatever their bytes make of torch's reader."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from fractalshards.errors import FractalError
from fractalshards.storage import atomic_file
from fractaltrain.checkpoint import Position, checkpoint_path, load_checkpoint, save_checkpoint

BYTES = [
    b"",
    b"rubbish\n",
    b"lorem ipsum",
    b"(",
    b"\x80\x02X",
    b"cos\nsystem\n",
    b"\x80\x05.",
    b"V\n",
    b"PK\x03\x04abc",
]


@pytest.mark.parametrize("data", BYTES)
def test_it_is_passed_over_or_refused_in_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder, data: bytes):
    save_checkpoint(tmp_path, Position(epoch=1), {"model": {}}, keep=2)
    newest = checkpoint_path(tmp_path, Position(epoch=2))
    newest.write_bytes(data)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.position == Position(epoch=1)
    [problem] = found.passed_over
    assert problem.startswith(f"{newest}: damaged (")
    assert "\n" not in problem
    checkpoint_path(tmp_path, Position(epoch=1)).unlink()
    with pytest.raises(FractalError, match="damaged"):
        load_checkpoint(tmp_path)
    assert len(recwarn) == 0


def test_ctrl_c_while_a_checkpoint_is_written_stays_ctrl_c(tmp_path, monkeypatch):
    """torch then fails to end the file, and says only that; nothing is left of it."""

    class Interrupted(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() > 200:
                raise KeyboardInterrupt
            return super().write(data)

    @contextmanager
    def interrupted_file(path: Path) -> Iterator[BinaryIO]:
        with atomic_file(path):
            yield Interrupted()

    monkeypatch.setattr("fractaltrain.checkpoint.atomic_file", interrupted_file)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, Position(), {"model": {"weight": torch.zeros(10_000)}}, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_a_checkpoint_that_memory_cannot_hold_is_not_called_damaged(tmp_path, monkeypatch, error):
    """The one before would be taken, and the next save would remove this one."""

    def load(path: Path, **options: object) -> None:
        raise error

    for epoch in (1, 2):
        save_checkpoint(tmp_path, Position(epoch), {"model": {}}, keep=2)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(FractalError, match=r"checkpoint-0002-0000000\.pt: no memory to load it; free some"):
        load_checkpoint(tmp_path)
