"""The names of a dataset's files, the sidecars of its shards, and its manifest ``_info.json``."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.human import human_bytes, human_count
from fractalshards.sample import LabelType
from fractalshards.storage import MAX_JSON_BYTES, parse_json, read_bounded, write_json

INFO = "_info.json"
RECIPE = "recipe.json"
SYSTEMS = "systems.npz"
TRAINING = "train"  # the split to train on

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def shard_name(split: str, shard: int) -> str:
    """Return the file name of a shard, e.g. ``train-000007.tar``."""
    return f"{split}-{shard:06d}.tar"


def sidecar_name(shard: str) -> str:
    """Return the file name of a shard's sidecar, e.g. ``train-000007.json``."""
    return Path(shard).with_suffix(".json").name


def sample_key(index: int) -> str:
    """Return the key of a sample: its index in the dataset, nine digits."""
    return f"{index:09d}"


def is_plain(name: str) -> bool:
    """Return whether ``name`` is a plain file name that cannot lead out of the folder.

    It has no separator, ``..`` or leading dot, and it is not a URL: webdataset runs ``pipe:`` URLs in a shell.
    """
    return _PLAIN.fullmatch(name) is not None and ".." not in name


FORMAT_VERSIONS = (1, 2)  # see ``systems.MAP_SHAPES``
MAX_CLASSES = 100_000  # names of systems have five digits
MAX_IMAGE_SIZE = 100_000
MAX_SHARD_SIZE = 100_000  # in samples, of shards that this software writes
MAX_SHARDS = 100_000  # of datasets that this software writes
MAX_SAMPLES = 10**9  # of a dataset; keys have nine digits
MAX_SAMPLE_BYTES = 64 << 20  # of a sample, which readers hold in memory
_SOFTWARE = ("fractalpretrain", "numpy", "numba", "isal")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_ImageSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_IMAGE_SIZE)]


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest lists it."""

    name: str
    samples: Count
    bytes: Count
    sha256: str
    content_digest: str


@dataclass(frozen=True)
class ShardRecord(Shard):
    """A shard's sidecar."""

    label_counts: tuple[Count, ...]  # the number of samples that show each class
    offsets: tuple[Count, ...]  # samples + 1 byte positions: sample i is ``offsets[i]:offsets[i + 1]``
    image_size: _ImageSize | None = None  # side of its images in pixels if all are squares of one size

    def shard(self) -> Shard:
        """Return the part that the manifest lists."""
        return Shard(self.name, self.samples, self.bytes, self.sha256, self.content_digest)


@dataclass(frozen=True)
class DatasetInfo:
    """The fields of a manifest that are known before any sample is written; ``recipe`` has JSON types only."""

    recipe: Mapping[str, Any]
    label_type: LabelType
    classes: Annotated[int, msgspec.Meta(ge=1, le=MAX_CLASSES)]
    class_names: tuple[str, ...] = ()
    class_ids: tuple[str, ...] = ()
    format_version: int = 1


class _Split(msgspec.Struct, frozen=True):
    """A split in ``_info.json``: lists with an entry per shard."""

    num_samples: Count
    filenames: tuple[str, ...]
    shard_lengths: tuple[Count, ...]
    bytes: tuple[Count, ...]
    sha256: tuple[str, ...]
    content_digests: tuple[str, ...]
    first_samples: tuple[Count, ...] | None = None

    def shards(self, where: str) -> tuple[Shard, ...]:
        lists = (self.filenames, self.shard_lengths, self.bytes, self.sha256, self.content_digests)
        if len(set(map(len, lists))) > 1:
            raise FractalError(f"{where}: the lists of a split differ in length; fetch or build it again")
        if sum(self.shard_lengths) != self.num_samples:
            raise FractalError(f"{where}: num_samples is not the sum of shard_lengths; fetch or build it again")
        return tuple(Shard(*row) for row in zip(*lists, strict=True))


class _Version(msgspec.Struct, frozen=True):
    format_version: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Stored(DatasetInfo):
    """``_info.json``."""

    recipe_digest: str
    image_size: _ImageSize | None
    splits: dict[str, _Split]
    software: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest(DatasetInfo):
    """``_info.json`` of a finished dataset.

    Attributes:
        class_names: by class index; empty if classes have no names.
        class_ids: ids from a public vocabulary (WordNet synsets) by class index, or empty.
        image_size: side of the square images in pixels; None if they differ.
        splits: the shards of ``train`` and perhaps ``val``, in order.
        first_samples: the index of the first sample of each shard.
    """

    folder: Path
    recipe_digest: str
    image_size: int | None
    splits: Mapping[str, tuple[Shard, ...]]
    first_samples: Mapping[str, tuple[int, ...]]
    software: Mapping[str, Any]

    def samples(self, split: str) -> int:
        """Return the number of samples in a split."""
        return sum(shard.samples for shard in self.splits[split])

    def bytes(self) -> int:
        """Return the size of all shards."""
        return sum(shard.bytes for shards in self.splits.values() for shard in shards)

    def content_digest(self) -> str:
        """Return 32 hexadecimal digits that identify the dataset, over the content digests of its shards in order."""
        digests = {name: [shard.content_digest for shard in shards] for name, shards in self.splits.items()}
        return mapping_digest(digests)

    def summary(self, where: str = "") -> str:
        """Return the folder, or ``where``, the numbers of images and shards, size and content digest in one line."""
        counts = ", ".join(f"{self.samples(name):,} {name}" for name in self.splits)
        shards = human_count(sum(map(len, self.splits.values())), "shard")
        size = human_bytes(self.bytes())
        return f"{where or self.folder}: {counts} images in {shards}, {size}, content {self.content_digest()}"


def write_record(folder: Path, record: ShardRecord) -> None:
    """Write a shard's sidecar."""
    write_json(folder / sidecar_name(record.name), asdict(record))


def read_record(folder: Path, shard: str, label_type: LabelType) -> ShardRecord:
    """Read and check a shard's sidecar; raises FractalError if it is not a valid record of this shard."""
    path = folder / sidecar_name(shard)
    return parse_record(read_bounded(path, MAX_JSON_BYTES), shard, label_type, str(path))


def parse_record(data: bytes, shard: str, label_type: LabelType, where: str) -> ShardRecord:
    """Parse and check a shard's sidecar that came from ``where``; see ``read_record``."""
    record = parse_json(data, ShardRecord, where)
    offsets, total = record.offsets, sum(record.label_counts)
    fitting = (
        record.name == shard
        and len(offsets) == record.samples + 1
        and offsets[0] == 0
        and offsets[-1] <= record.bytes
        and all(0 < end - start <= MAX_SAMPLE_BYTES for start, end in pairwise(offsets))
        and (total == record.samples if label_type == "single" else total >= record.samples)
        and max(record.label_counts, default=0) <= record.samples
    )
    if not fitting:
        raise FractalError(f"{where}: does not describe {shard}; fetch or build both again")
    return record


def write_manifest(
    folder: Path, splits: Mapping[str, Sequence[Shard]], info: DatasetInfo, image_size: int | None
) -> None:
    """Write ``_info.json``, with timm's keys and our own; see ``Manifest``."""
    alt_label = {"alt_label": "labels"} if info.label_type == "multi" else {}  # the field of KEY.json for timm to read
    fields = {
        "format_version": info.format_version,
        "recipe": dict(info.recipe),
        "recipe_digest": mapping_digest(info.recipe),
        "label_type": info.label_type,
        "classes": info.classes,
        "image_size": image_size,
        **({"class_names": info.class_names} if info.class_names else {}),
        **({"class_ids": info.class_ids} if info.class_ids else {}),
        "software": {"python": platform.python_version(), **{name: version(name) for name in _SOFTWARE}},
        "splits": {
            name: {
                "name": name,
                **alt_label,
                "num_samples": sum(shard.samples for shard in shards),
                "filenames": [shard.name for shard in shards],
                "shard_lengths": [shard.samples for shard in shards],
                "bytes": [shard.bytes for shard in shards],
                "sha256": [shard.sha256 for shard in shards],
                "content_digests": [shard.content_digest for shard in shards],
            }
            for name, shards in splits.items()
        },
    }
    write_json(folder / INFO, fields, indent=1)


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/_info.json``; raises FractalError if it is missing or not what the format says."""
    path = find_manifest(folder)
    return parse_manifest(read_bounded(path, MAX_JSON_BYTES), folder, str(path))


def find_manifest(folder: Path) -> Path:
    """Return the path of a finished dataset's ``_info.json``; raise FractalError if it is missing."""
    path = folder / INFO
    if folder.is_file():
        raise FractalError(f"{folder}: is a file; give the folder of the dataset")
    if not folder.is_dir():
        raise FractalError(f"{folder}: no such folder; check the path, or build a dataset with 'fractalgen build'")
    if not path.is_file():
        advice = "let the command that builds it finish" if (folder / RECIPE).exists() else "check the path"
        raise FractalError(f"{folder}: no {INFO}, so not a finished dataset; {advice}")
    return path


def parse_manifest(data: bytes, folder: Path, where: str) -> Manifest:
    """Parse and check a manifest that came from ``where``; see ``load_manifest``."""
    found = parse_json(data, _Version, where).format_version
    if found is None:
        raise FractalError(f"{where}: other software wrote it; only fractaltrain reads such datasets, in local folders")
    if found not in FORMAT_VERSIONS:
        raise FractalError(f"{where}: format version {found}, not {FORMAT_VERSIONS[-1]}; upgrade fractalpretrain")
    info = parse_json(data, _Stored, where)
    for name, names in (("class_names", info.class_names), ("class_ids", info.class_ids)):
        if len(names) not in (0, info.classes):
            raise FractalError(f"{where}: {len(names)} {name} for {info.classes} classes; fetch or build it again")
    check_names({name: split.filenames for name, split in info.splits.items()}, where)
    splits = {name: split.shards(where) for name, split in info.splits.items()}
    first_samples = _first_samples(info.splits, where)
    return Manifest(**vars(info) | {"folder": folder, "splits": splits, "first_samples": first_samples})


def check_names(splits: Mapping[str, Sequence[str]], where: str) -> None:
    """Raise FractalError if a shard is not named ``SPLIT-NNNNNN.tar`` after its split, or is listed twice.

    Its sidecar could otherwise have the name of another file, and a name could lead out of the folder.
    """
    for split, shards in splits.items():
        if split not in (TRAINING, "val"):
            raise FractalError(f"{where}: {split!r} is neither train nor val; do not use this dataset")
        for name in shards:
            if not re.fullmatch(rf"{split}-[0-9]{{6}}\.tar", name):
                raise FractalError(f"{where}: {name!r} is not the name of a {split} shard; do not use this dataset")
        if len(set(shards)) != len(shards):
            raise FractalError(f"{where}: lists a shard twice; do not use this dataset")


def split_shards(manifest: Manifest, split: str) -> tuple[Shard, ...]:
    """Return the shards of a split; raise FractalError if the dataset does not have it."""
    if split not in manifest.splits:
        raise FractalError(f"{manifest.folder}: no split {split!r}; it has {', '.join(manifest.splits)}")
    return manifest.splits[split]


def _first_samples(splits: Mapping[str, _Split], where: str) -> dict[str, tuple[int, ...]]:
    """Return the index of every shard's first sample: as listed, or counted on from the shard before."""
    firsts = {}
    end = 0
    for name, split in splits.items():
        lengths = split.shard_lengths
        listed = split.first_samples
        if listed is None:
            listed = tuple(accumulate(lengths, initial=end))[:-1]
        ends = [end, *(first + samples for first, samples in zip(listed, lengths, strict=False))]
        if len(listed) != len(lengths) or any(first < end for first, end in zip(listed, ends, strict=False)):
            raise FractalError(f"{where}: first_samples do not fit shard_lengths; fetch or build it again")
        firsts[name], end = listed, ends[-1]
    return firsts
