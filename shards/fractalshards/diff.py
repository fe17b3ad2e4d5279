"""Compare two datasets: whether they hold the same samples under the same keys, and which differ."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

import xxhash

from fractalshards.digest import hashed_image
from fractalshards.human import human_count, human_list
from fractalshards.manifest import Manifest, Shard
from fractalshards.reader import ShardIndex, decode_shard, index_split
from fractalshards.recipe_file import recipe_differences
from fractalshards.sample import label_extension
from fractalshards.workers import OnProgress, no_progress, worker_pool

MAX_READ = 20  # differing shards of a split whose samples are compared
_MAX_KEYS = 5  # named per shard
_FACTS = ("label_type", "classes", "image_size", "class_names", "class_ids")

Manifests = tuple[Manifest, Manifest]
Pair = tuple[tuple[Shard, ...], tuple[Shard, ...]]  # shards of side 0, the first dataset, and of side 1


@dataclass(frozen=True)
class DatasetDiff:
    """Whether two datasets hold the same samples under the same keys, and findings of one line each."""

    same: bool
    findings: tuple[str, ...]


class SampleDigest(NamedTuple):
    """A sample's key, and digests of the image and the label bytes that enter its content digest."""

    key: str
    image: str
    label: str


def compare_datasets(
    first: Manifest, second: Manifest, workers: int, on_progress: OnProgress = no_progress
) -> DatasetDiff:
    """Compare the samples of two datasets; images are only read where content digests differ.

    ``on_progress`` is called with samples read and samples to read, split by split.
    """
    splits = dict.fromkeys((*first.splits, *second.splits))
    diffs = [_compare_split((first, second), split, workers, on_progress) for split in splits]
    findings = (*_describe_manifests(first, second), *chain.from_iterable(diff.findings for diff in diffs))
    return DatasetDiff(all(diff.same for diff in diffs), findings)


def differing_shards(rows: Pair) -> tuple[Pair, Pair]:
    """Find the shards of a split that only one side has, by content digest, which includes the keys.

    Returns those whose samples may be in other shards of the other side, and those that begin after its last sample.
    """
    known = [{shard.content_digest for shard in row} for row in rows]
    shorter = min(sum(shard.samples for shard in row) for row in rows)
    within: list[tuple[Shard, ...]] = []
    beyond: list[tuple[Shard, ...]] = []
    for row, others in zip(rows, reversed(known), strict=True):
        starts = accumulate((shard.samples for shard in row), initial=0)
        count = sum(start < shorter for start, _ in zip(starts, row, strict=False))
        within.append(tuple(shard for shard in row[:count] if shard.content_digest not in others))
        beyond.append(row[count:])
    return (within[0], within[1]), (beyond[0], beyond[1])


def digest_shard(index: ShardIndex, classes: int) -> list[SampleDigest]:
    """Digest the samples of a shard; raises a FractalError that names the first damaged one."""
    digests = []
    for sample, pixels, _ in decode_shard(index, classes):
        image = xxhash.xxh3_128()
        for part in hashed_image(sample, pixels):
            image.update(part)
        label = xxhash.xxh3_128_hexdigest(sample.files[label_extension(sample.files)])
        digests.append(SampleDigest(sample.key, image.hexdigest(), label))
    return digests


class Matcher:
    """Pairs the samples of two sides by key, in any order; only unpaired samples take memory."""

    def __init__(self) -> None:
        self._unpaired: tuple[dict[str, tuple[str, SampleDigest]], ...] = ({}, {})
        self._different: dict[str, list[str]] = {}

    def add(self, side: int, shard: str, samples: Iterable[SampleDigest]) -> None:
        """Add samples of a shard of side 0 or 1."""
        for sample in samples:
            if (found := self._unpaired[1 - side].pop(sample.key, None)) is None:
                self._unpaired[side][sample.key] = shard, sample
                continue
            other_shard, other = found
            if fields := [name for name in ("image", "label") if getattr(sample, name) != getattr(other, name)]:
                named = (shard, other_shard)[side]  # the shard of side 0
                self._different.setdefault(named, []).append(f"{sample.key} ({' and '.join(fields)})")

    def findings(self, absent: tuple[str, str]) -> list[str]:
        """Name the samples that differ or are missing, one line per shard.

        ``absent`` has the words for samples of side 0, and of side 1, that the other side lacks.
        """
        lines = [_name_samples(shard, keys, "not the same") for shard, keys in sorted(self._different.items())]
        for words, unpaired in zip(absent, self._unpaired, strict=True):
            shards: dict[str, list[str]] = {}
            for key, (shard, _) in unpaired.items():
                shards.setdefault(shard, []).append(key)
            lines += [_name_samples(shard, keys, words) for shard, keys in sorted(shards.items())]
        return lines


def _name_samples(shard: str, keys: Sequence[str], what: str) -> str:
    return f"{shard}: {human_count(len(keys), 'sample')} {what}: {human_list(sorted(keys), _MAX_KEYS)}"


def _compare_split(manifests: Manifests, split: str, workers: int, on_progress: OnProgress) -> DatasetDiff:
    for one, other in (manifests, manifests[::-1]):
        if split not in other.splits:
            return DatasetDiff(False, (f"{split}: only in {one.folder}, {_count_samples(one.splits[split])}",))
    rows = manifests[0].splits[split], manifests[1].splits[split]
    within, beyond = differing_shards(rows)
    lines = list(_compare_shards(manifests, split, within, workers, on_progress))
    for manifest, shards in zip(manifests, beyond, strict=True):
        if shards:
            lines.append(f"{_count_samples(shards)} more in {manifest.folder}, from {shards[0].name} on")
    if lines:
        return DatasetDiff(False, tuple(f"{split}: {line}" for line in lines))
    remarks = ""
    if any(within):
        remarks += f", in {len(rows[0]):,} and {len(rows[1]):,} shards"
    copies = {shard.content_digest: shard.sha256 for shard in rows[0]}
    if count := sum(copies.get(shard.content_digest, shard.sha256) != shard.sha256 for shard in rows[1]):
        remarks += f"; {human_count(count, 'shard')} with different bytes, written by another CPU or other software"
    return DatasetDiff(True, (f"{split}: the same {_count_samples(rows[0])}{remarks}",))


def _compare_shards(
    manifests: Manifests, split: str, rows: Pair, workers: int, on_progress: OnProgress
) -> Iterator[str]:
    """Read the shards that differ, only the first ones if the splits are cut alike, and describe the differences."""
    cut_alike = [shard.samples for shard in rows[0]] == [shard.samples for shard in rows[1]]
    unread = max(len(rows[0]) - MAX_READ, 0) if cut_alike else 0
    words = "not in the same shard of" if unread else "not in"
    absent = f"{words} {manifests[1].folder}", f"{words} {manifests[0].folder}"
    read = [row[:MAX_READ] for row in rows] if cut_alike else rows
    found = _match(manifests, split, read, workers, on_progress).findings(absent) if any(read) else []
    yield from found
    if any(read) and cut_alike and not found:
        count = human_count(len(read[0]), "shard")
        yield (
            f"content digests of {count} differ, but the samples are the same: their order differs, or a manifest is "
            "wrong; check both with 'fractalshards verify'"
        )
    if unread:
        yield f"content digests of {human_count(unread, 'more shard')} differ; their samples were not compared"


def _match(
    manifests: Manifests, split: str, rows: Sequence[Sequence[Shard]], workers: int, on_progress: OnProgress
) -> Matcher:
    """Read and match the samples of some shards of both sides.

    Shards are read in the order of their first samples, so that samples are soon paired and few take memory.
    """
    matcher = Matcher()
    tasks: list[tuple[int, int, ShardIndex]] = []
    for side, (manifest, row) in enumerate(zip(manifests, rows, strict=True)):
        indices = {index.path.name: index for index in index_split(manifest, split)}
        starts = accumulate((shard.samples for shard in row), initial=0)
        tasks += [(start, side, indices[shard.name]) for start, shard in zip(starts, row, strict=False)]
    done, total = 0, sum(shard.samples for row in rows for shard in row)
    with worker_pool(workers) as pool:
        futures = {
            pool.submit(digest_shard, index, manifests[side].classes): (side, index.path.name)
            for _, side, index in sorted(tasks, key=itemgetter(0))
        }
        for future in as_completed(futures):
            side, shard = futures.pop(future)  # frees the digests of a shard once they are matched
            digests = future.result()
            matcher.add(side, shard, digests)
            done += len(digests)
            on_progress(done, total)
    return matcher


def _describe_manifests(first: Manifest, second: Manifest) -> Iterator[str]:
    """Describe how the manifests differ apart from their shards, which does not mean that samples differ."""
    for name, one, other in recipe_differences(first.recipe, second.recipe):
        yield f"recipe: {name} is {one} in {first.folder}, {other} in {second.folder}"
    for name in _FACTS:
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            values = "" if isinstance(one, tuple) else f": {one} in {first.folder}, {other} in {second.folder}"
            yield f"different {name}{values}"


def _count_samples(shards: Sequence[Shard]) -> str:
    return human_count(sum(shard.samples for shard in shards), "sample")
