"""Matches the samples of two datasets by key: what a sample is in two digests, and which have no equal."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, zip_longest

import xxhash

from fractalshards.console import old_progress as progress
from fractalshards.digest import hashed_image
from fractalshards.errors import FractalError
from fractalshards.human import human_count
from fractalshards.manifest import Manifest, Shard, recipe_differences
from fractalshards.reader import ShardIndex, decode_sample, index_split, iterate_shard
from fractalshards.sample import label_extension
from fractalshards.workers import worker_pool

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


MAX_READ = 20  # differing shards of a split that are looked into: enough to see what is going on
_FACTS = ("label_type", "classes", "image_size", "class_names", "class_ids")

Manifests = tuple[Manifest, Manifest]
Pair = tuple[tuple[Shard, ...], tuple[Shard, ...]]  # of side 0, the first dataset, and of side 1


@dataclass(frozen=True)
class Comparison:
    """Whether two datasets hold the same samples under the same keys, and what was found, a line each."""

    same: bool
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Alignment:
    """The shards of a split of two datasets, laid beside each other.

    Attributes:
        alike: one shard on either side with the same content digest.
        unlike: one shard on either side with different content digests.
        regrouped: several shards that may hold the same samples, divided in another way.
        extra: what follows on one side after the other has ended.
    """

    alike: tuple[Pair, ...]
    unlike: tuple[Pair, ...]
    regrouped: tuple[Pair, ...]
    extra: Pair


def compare_datasets(first: Manifest, second: Manifest, workers: int) -> Comparison:
    """Compare what two datasets hold; images are read only where the manifests leave open what differs.

    Raises:
        FractalError: if a sample that must be read is damaged or missing, or a worker process was killed too often.
        OSError: if a file cannot be read.
    """
    splits = dict.fromkeys((*first.splits, *second.splits))
    compared = [_compare_split((first, second), split, workers) for split in splits]
    findings = chain(_described(first, second), *(one.findings for one in compared))
    return Comparison(all(one.same for one in compared), tuple(findings))


def align(first: Sequence[Shard], second: Sequence[Shard]) -> Alignment:
    """Lay shards beside each other by their numbers of samples."""
    *pairs, extra = _stretches(first, second)
    single = [pair for pair in pairs if len(pair[0]) == len(pair[1]) == 1]
    return Alignment(
        alike=tuple(pair for pair in single if _digests(pair[0]) == _digests(pair[1])),
        unlike=tuple(pair for pair in single if _digests(pair[0]) != _digests(pair[1])),
        regrouped=tuple(pair for pair in pairs if not len(pair[0]) == len(pair[1]) == 1),
        extra=extra,
    )


def _stretches(first: Sequence[Shard], second: Sequence[Shard]) -> Iterator[Pair]:
    """Cut two rows of shards wherever both have an end of a shard; last comes what one has more, perhaps nothing."""
    rows = (tuple(first), tuple(second))
    ends = [list(accumulate(shard.samples for shard in row)) for row in rows]
    cuts = [(bisect_right(ends[0], end), bisect_right(ends[1], end)) for end in sorted({*ends[0]} & {*ends[1]})]
    left, right = cuts[-1] if cuts else (0, 0)
    if left < len(first) and right < len(second):  # both go on, one of them further
        reach = min(ends[0][-1], ends[1][-1])
        cuts.append((bisect_left(ends[0], reach) + 1, bisect_left(ends[1], reach) + 1))
    for (left, right), (left_end, right_end) in pairwise(((0, 0), *cuts, (len(first), len(second)))):
        yield rows[0][left:left_end], rows[1][right:right_end]


def _compare_split(manifests: Manifests, split: str, workers: int) -> Comparison:
    for one, other in (manifests, manifests[::-1]):
        if split not in other.splits:
            return Comparison(False, (f"{split}: only in {one.folder}, {_samples(one.splits[split])}",))
    rows = (manifests[0].splits[split], manifests[1].splits[split])
    aligned = align(*rows)
    lines = [*_unlike(manifests, split, aligned, workers), *_more(manifests, aligned.extra)]
    if lines:
        return Comparison(False, tuple(f"{split}: {line}" for line in lines))
    return Comparison(True, (f"{split}: the same {_samples(rows[0])}{_remarks(aligned, rows)}",))


def _unlike(manifests: Manifests, split: str, aligned: Alignment, workers: int) -> Iterator[str]:
    """What differs in the shards that the manifests do not promise to be the same."""
    read = (*aligned.unlike[:MAX_READ], *aligned.regrouped)
    left = len(aligned.unlike) - MAX_READ
    words = "not in the same shard of" if left > 0 else "not in"
    absent = f"{words} {manifests[1].folder}", f"{words} {manifests[0].folder}"
    found = _match(manifests, split, read, workers).findings(absent) if read else []
    yield from found
    if aligned.unlike and not found:
        count = human_count(min(len(aligned.unlike), MAX_READ), "shard")
        yield (
            f"content digests of {count} differ, but the samples are the same: in another order, or a manifest is not "
            "true ('fractalshards verify' tells)"
        )
    if left > 0:
        yield f"content digests of {human_count(left, 'more shard')} differ; their samples were not looked at"


def _match(manifests: Manifests, split: str, pairs: Sequence[Pair], workers: int) -> Matcher:
    """Read and match the samples of some shards."""
    matcher = Matcher()
    tasks = list(_tasks(manifests, split, pairs))
    samples = sum(len(task.index.offsets) - 1 for task in tasks)
    with progress("comparing", samples, "samples") as advance, worker_pool(workers) as pool:
        # futures are let go one by one, for together they may hold what they found in a million samples
        for future in as_completed([pool.submit(digest_shard, task) for task in tasks]):
            task, digests = future.result()
            matcher.add(task.side, task.index.path.name, digests)
            advance(len(digests))
    return matcher


def _tasks(manifests: Manifests, split: str, pairs: Sequence[Pair]) -> Iterator[ShardToDigest]:
    """The shards of both sides, by turns: so samples do not wait long for their like."""
    indices = [{index.path.name: index for index in index_split(manifest, split)} for manifest in manifests]
    for pair in pairs:
        for shards in zip_longest(*pair):
            for side, shard in enumerate(shards):
                if shard is not None:
                    yield ShardToDigest(side, indices[side][shard.name], manifests[side].classes)


def _more(manifests: Manifests, extra: Pair) -> Iterator[str]:
    for manifest, shards in zip(manifests, extra, strict=True):
        if shards:
            yield f"{_samples(shards)} more in {manifest.folder}, from {shards[0].name} on"


def _remarks(aligned: Alignment, rows: Pair) -> str:
    """What is not the same although the samples are."""
    other = sum(first.sha256 != second.sha256 for (first,), (second,) in aligned.alike)
    remarks = ""
    if aligned.regrouped:
        remarks += f", in other shards: {len(rows[0]):,} and {len(rows[1]):,}"
    if other:
        remarks += f"; {human_count(other, 'shard')} of other bytes: another CPU, or other software, wrote them"
    return remarks


def _described(first: Manifest, second: Manifest) -> Iterator[str]:
    """In what the manifests differ besides their shards; this does not say that samples differ."""
    for name, one, other in recipe_differences(first.recipe, second.recipe):
        yield f"recipe: {name} is {one} in {first.folder}, {other} in {second.folder}"
    for name in _FACTS:
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            told = "" if isinstance(one, tuple) else f": {one} in {first.folder}, {other} in {second.folder}"
            yield f"{name} differ{told}"


def _digests(shards: Sequence[Shard]) -> list[str]:
    return [shard.content_digest for shard in shards]


def _samples(shards: Sequence[Shard]) -> str:
    return human_count(sum(shard.samples for shard in shards), "sample")
