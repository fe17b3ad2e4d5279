"""Run ``fractalshards`` in this process, write small datasets, and read the images of packed ones back."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from fractalshards.cli import main
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.manifest import RECIPE, SYSTEMS, DatasetInfo, load_manifest, sample_key, shard_name, write_manifest
from fractalshards.png import encode_png
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import Label, Sample, decode_label
from fractalshards.storage import write_json
from fractalshards.systems import write_systems
from fractalshards.writer import Rendered, write_shard

Make = Callable[..., Path]
Encode = Callable[..., bytes]
Samples = list[tuple[str, Rendered]]  # keys, images and labels
Members = dict[str, bytes | str] | list[tuple[str, bytes | str]]
CLASSES = {"tulip": 11, "aster": 14, "rose": 10}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def good(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def pack(source: object, out: Path, *options: str) -> Result:
    return good("pack", source, out, "--workers", "1", *options)


def is_sound(folder: Path) -> bool:
    return run("verify", folder, "--workers", "1").exit_code == 0


def assert_refused(result: Result, code: int, *nouns: str) -> None:
    """Assert that a command failed with one error, the last line, that names the file or the option."""
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert all(noun in line for noun in nouns), line
    assert result.stderr.endswith(f"{line}\n")


def write_dataset(
    folder: Path,
    splits: dict[str, Sequence[Samples]],
    info: DatasetInfo,
    size: int | None = None,
    encode: Encode = encode_png,
) -> Path:
    """Write the shards of splits, and the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {
        split: [write_shard(folder, shard_name(split, i), info.classes, one, encode) for i, one in enumerate(shards)]
        for split, shards in splits.items()
    }
    write_manifest(folder, records, info, size)
    return folder


def write_small(folder: Path, labels: Sequence[Label], shard_size: int, val: int = 0) -> Path:
    """Write random images of 16 x 16 pixels, of three classes, the last ``val`` of them held out, and their recipe."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    systems = [rng.random((2, 2, 3)) for _ in range(3)]
    recipe = {"kind": "random", "n": len(labels), "systems_digest": systems_digest(systems)}
    write_systems(folder / SYSTEMS, systems)
    write_json(folder / RECIPE, {"recipe": recipe, "recipe_digest": mapping_digest(recipe)})
    samples: Samples = [
        (sample_key(index), (rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), label))
        for index, label in enumerate(labels)
    ]
    n = len(samples) - val
    splits = {"train": [samples[first : min(first + shard_size, n)] for first in range(0, n, shard_size)]}
    splits |= {"val": [samples[n:]]} if val else {}
    info = DatasetInfo(recipe, "single" if isinstance(labels[0], int) else "multi", 3)
    return write_dataset(folder, splits, info, 16)


def write_tar(path: Path, files: Members, form: int = tarfile.USTAR_FORMAT, **fields: object) -> Path:
    """Write files as another program does, with these fields in their headers; text instead of bytes is a hard link."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            link = {"type": tarfile.LNKTYPE, "linkname": data} if isinstance(data, str) else {"size": len(data)}
            for field, value in {**fields, **link}.items():
                setattr(member, field, value)
            tar.addfile(member, None if isinstance(data, str) else io.BytesIO(data))
    return path


def samples(dataset: Path, split: str) -> list[Sample]:
    return [sample for shard in index_split(load_manifest(dataset), split) for sample in iterate_shard(shard)]


def images(dataset: Path, split: str) -> dict[bytes, int]:
    """Map the bytes of every image file of a split to its class."""
    found = samples(dataset, split)
    pairs = [(data, decode_label(one.files)) for one in found for end, data in one.files.items() if end != "cls"]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)
