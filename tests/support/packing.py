"""Run ``fractalshards pack`` in this process, and read the images of a packed dataset back."""

from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner, Result

from fractalshards.cli import main
from fractalshards.manifest import load_manifest
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import Sample, decode_label

Make = Callable[..., Path]
Encode = Callable[..., bytes]
CLASSES = {"tulip": 11, "aster": 14, "rose": 10}


def pack(source: object, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["pack", str(source), str(out), "--workers", "1", *options])


def samples(dataset: Path, split: str) -> list[Sample]:
    return [sample for shard in index_split(load_manifest(dataset), split) for sample in iterate_shard(shard)]


def images(dataset: Path, split: str) -> dict[bytes, int]:
    """Map the bytes of every image file of a split to its class."""
    found = samples(dataset, split)
    pairs = [(data, decode_label(one.files)) for one in found for end, data in one.files.items() if end != "cls"]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def assert_refused(result: Result, code: int, noun: str) -> None:
    """Assert that a command failed with one line that names the file or the option."""
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert noun in line
