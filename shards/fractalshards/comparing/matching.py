"""Matches the samples of two datasets by key: what a sample is in two digests, and which have no equal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from fractalshards.digest import hashed_image
from fractalshards.errors import FractalError
from fractalshards.human import human_count
from fractalshards.labels import label_extension
from fractalshards.reader import ShardIndex, decode_sample, iterate_shard

_MAX_KEYS = 5  # named of a shard


@dataclass(frozen=True, slots=True)
class SampleDigest:
    """A sample's key, and digests of its image and of its label: of what enters a content digest."""

    key: str
    image: str
    label: str


@dataclass(frozen=True)
class ShardToDigest:
    """A shard of side 0 or 1, whose labels are below ``classes``."""

    side: int
    index: ShardIndex
    classes: int


def digest_shard(task: ShardToDigest) -> tuple[ShardToDigest, list[SampleDigest]]:
    """The task and what it asks for, the samples of a shard; for worker processes.

    Raises:
        FractalError: if a sample is damaged, naming it.
        OSError: if the shard cannot be read.
    """
    digests = []
    for sample in iterate_shard(task.index):
        try:
            pixels, _ = decode_sample(sample, task.classes)
        except FractalError as error:
            raise FractalError(f"{task.index.path}: {sample.key}: {error}; fetch or build it again") from error
        label = sample.files[label_extension(sample.files)]
        image = xxhash.xxh3_128()
        for part in hashed_image(sample, pixels):
            image.update(part)
        digests.append(SampleDigest(sample.key, image.hexdigest(), xxhash.xxh3_128(label).hexdigest()))
    return task, digests


class Matcher:
    """Takes the samples of two sides, 0 and 1, in any order, and remembers those without an equal.

    Memory grows with the samples that wait for their like, not with all.
    """

    def __init__(self) -> None:
        self._waiting: tuple[dict[str, tuple[str, SampleDigest]], ...] = ({}, {})
        self._differing: dict[str, list[str]] = {}

    def add(self, side: int, shard: str, samples: Iterable[SampleDigest]) -> None:
        """Take in samples of a shard of one side."""
        for sample in samples:
            if (found := self._waiting[1 - side].pop(sample.key, None)) is None:
                self._waiting[side][sample.key] = shard, sample
            elif what := _difference(sample, found[1]):
                named = (shard, found[0])[side]  # as side 0 calls the shard
                self._differing.setdefault(named, []).append(f"{sample.key} ({what})")

    def findings(self, absent: tuple[str, str]) -> list[str]:
        """What has no equal, a line for every shard.

        Args:
            absent: how to say that samples of a side, 0 or 1, are not on the other.
        """
        lines = [f"{shard}: {_some(keys, 'not the same')}" for shard, keys in sorted(self._differing.items())]
        for words, waiting in zip(absent, self._waiting, strict=True):
            shards: dict[str, list[str]] = {}
            for key, (shard, _) in waiting.items():
                shards.setdefault(shard, []).append(key)
            lines += [f"{shard}: {_some(keys, words)}" for shard, keys in sorted(shards.items())]
        return lines


def _difference(one: SampleDigest, other: SampleDigest) -> str:
    """In what two samples with the same key differ; empty if in nothing."""
    return " and ".join(name for name in ("image", "label") if getattr(one, name) != getattr(other, name))


def _some(keys: Sequence[str], what: str) -> str:
    """How many samples, what of them, and the first of them."""
    rest = f" and {len(keys) - _MAX_KEYS:,} more" if len(keys) > _MAX_KEYS else ""
    named = ", ".join(sorted(keys)[:_MAX_KEYS])
    return f"{human_count(len(keys), 'sample')} {what}: {named}{rest}"
