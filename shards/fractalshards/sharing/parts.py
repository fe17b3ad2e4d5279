"""Parts of a dataset: some of its shards by their numbers, and manifests that list only these. Pure functions."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import Manifest, Shard, split_lists

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_SHARD = re.compile(r"(train|val)-(\d{6})\.tar")


@dataclass(frozen=True)
class Listing:
    """A manifest as it is written, and what it says."""

    text: bytes
    manifest: Manifest

    def entries(self) -> "dict[str, Entry]":
        """Its shards by name."""
        return {entry.shard.name: entry for entry in entries(self.manifest)}


@dataclass(frozen=True)
class Entry:
    """A line of a manifest: a shard, and the index of its first sample."""

    split: str
    first: int
    shard: Shard


def parse_numbers(text: str) -> tuple[range, ...]:
    """``0-9,12`` as ranges of shard numbers.

    Raises:
        UsageError: if it is anything else.
    """
    ranges = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--shards {text}: expected numbers and ranges of shards such as 0-9,12")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(ranges)


def entries(manifest: Manifest) -> tuple[Entry, ...]:
    """All lines of a manifest, in order."""
    return tuple(
        Entry(split, first, shard)
        for split, shards in manifest.splits.items()
        for first, shard in zip(manifest.first_samples[split], shards, strict=True)
    )


def select(manifest: Manifest, wanted: Sequence[range] | None, where: str) -> tuple[Entry, ...]:
    """The lines of the wanted shards of every split; of all, if None.

    Raises:
        FractalError: if a shard's name is not as the format says.
        UsageError: if a wanted range has none of the shards at its ends.
    """
    numbers = {entry.shard.name: shard_number(entry.shard.name, where) for entry in entries(manifest)}
    if wanted is None:
        return entries(manifest)
    there = set(numbers.values())
    for end in (end for part in wanted for end in (part[0], part[-1])):
        if end not in there:
            raise UsageError(f"{where}: has no shard {end}; its numbers are {_spans(there)}")
    return tuple(entry for entry in entries(manifest) if any(numbers[entry.shard.name] in part for part in wanted))


def shard_number(name: str, where: str) -> int:
    """The number in a shard's name.

    Raises:
        FractalError: if it is not as the format says. Other plain names could be those of files that are no shards.
    """
    match = _SHARD.fullmatch(name)
    if match is None:
        raise FractalError(f"{where}: {name!r} is not the name of a shard, SPLIT-NNNNNN.tar; do not use this dataset")
    return int(match[2])


def check_same(one: Manifest, other: Manifest, where: str, advice: str) -> None:
    """Refuse to mix two datasets: their recipe, and the content of every shard that both list, must be the same.

    Raises:
        FractalError: naming ``where``, and the advice.
    """
    traits = [(m.recipe_digest, m.label_type, m.classes, m.image_size, m.class_names) for m in (one, other)]
    lines = [{e.shard.name: (e.split, e.first, e.shard.content_digest) for e in entries(m)} for m in (one, other)]
    differing = [name for name in lines[0].keys() & lines[1].keys() if lines[0][name] != lines[1][name]]
    if traits[0] != traits[1] or differing:
        what = f"{min(differing)} has other content" if differing else f"recipe digest {other.recipe_digest}"
        raise FractalError(f"{where}: holds another dataset ({what}); {advice}")


def write_listing(bases: Sequence[Listing], chosen: Collection[Entry]) -> bytes:
    """The text of a manifest that lists ``chosen``: that of a base if it lists just these.

    Args:
        bases: manifests of the same dataset; the other fields come from the first that has them.
    """
    for base in bases:
        if set(chosen) == set(entries(base.manifest)):
            return base.text
    others: dict[str, Any] = {}
    for base in reversed(bases):  # one at a time is in memory
        document = json.loads(base.text)
        others |= document["splits"]
    ordered = sorted(chosen, key=lambda entry: entry.first)
    names = list(dict.fromkeys(entry.split for entry in ordered))
    splits = {name: [entry for entry in ordered if entry.split == name] for name in names}
    whole = _counts_from_zero(ordered)
    document["splits"] = {
        name: _split_fields(name, {k: v for k, v in others[name].items() if k != "first_samples"}, part, whole)
        for name, part in splits.items()
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def _split_fields(name: str, others: Mapping[str, Any], part: Sequence[Entry], whole: bool) -> dict[str, Any]:
    firsts = {} if whole else {"first_samples": [entry.first for entry in part]}
    return {**others, "name": name, **split_lists([entry.shard for entry in part]), **firsts}


def _counts_from_zero(ordered: Iterable[Entry]) -> bool:
    end = 0
    for entry in ordered:
        if entry.first != end:
            return False
        end += entry.shard.samples
    return True


def _spans(numbers: Iterable[int]) -> str:
    """``0-9, 12``"""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans[:20])
