"""Compare two datasets: whether they hold the same samples under the same keys, and which differ."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter

import xxhash

from fractalshards.digest import hashed_image
from fractalshards.human import human_count, human_list
from fractalshards.manifest import Manifest, Shard
from fractalshards.reader import ShardIndex, decode_shard, index_split
from fractalshards.recipe_file import recipe_differences
from fractalshards.sample import label_extension
from fractalshards.workers import OnProgress, as_finished, no_progress, worker_pool

MAX_READ = 20  # differing shards of a split whose samples are compared
_MAX_KEYS = 5  # named per shard
_FACTS = ("label_type", "classes", "image_size", "class_names", "class_ids")

Manifests = tuple[Manifest, Manifest]
Shards = Sequence[Shard]


@dataclass(frozen=True)
class DatasetDiff:
    """Whether two datasets hold the same samples under the same keys, and findings of one line each."""

    same: bool
    findings: tuple[str, ...]


def compare_datasets(
    first: Manifest, second: Manifest, workers: int, on_progress: OnProgress = no_progress
) -> DatasetDiff:
    """Compare the samples of two datasets; images are only read where content digests differ.

    ``on_progress`` is called with samples read and samples to read, split by split.
    """
    same = True
    findings = list(_describe_manifests(first, second))
    for split in dict.fromkeys((*first.splits, *second.splits)):
        lines = list(_compare_split((first, second), split, workers, on_progress))
        same = same and not lines
        lines = lines or [_describe_same(first.splits[split], second.splits[split])]
        findings += [f"{split}: {line}" for line in lines]
    return DatasetDiff(same, tuple(findings))


def _describe_manifests(first: Manifest, second: Manifest) -> Iterator[str]:
    """Describe how the manifests differ apart from their shards, which does not mean that samples differ."""
    for name, one, other in recipe_differences(first.recipe, second.recipe):
        yield f"recipe: {name} is {one} in {first.folder}, {other} in {second.folder}"
    for name in _FACTS:
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            values = "" if isinstance(one, tuple) else f": {one} in {first.folder}, {other} in {second.folder}"
            yield f"different {name}{values}"


def _describe_same(first: Shards, second: Shards) -> str:
    """Describe splits with the same samples."""
    text = f"the same {_count_samples(first)}"
    if len(first) != len(second):
        text += f", in {len(first):,} and {len(second):,} shards"
    copies = {shard.content_digest: shard.sha256 for shard in first}
    if count := sum(copies.get(shard.content_digest, shard.sha256) != shard.sha256 for shard in second):
        text += f"; {human_count(count, 'shard')} with different bytes, written by another CPU or other software"
    return text


def _compare_split(manifests: Manifests, split: str, workers: int, on_progress: OnProgress) -> Iterator[str]:
    """Describe the differences of a split, if any.

    Reads the shards that only one side has, by content digest, which includes the keys: only the first ones if both
    sides are cut alike, and none that begins after the last sample of the other side.
    """
    for one, other in (manifests, manifests[::-1]):
        if split not in other.splits:
            yield f"only in {one.folder}, {_count_samples(one.splits[split])}"
            return
    rows = [manifest.splits[split] for manifest in manifests]
    shorter = min(sum(shard.samples for shard in row) for row in rows)
    differing: list[Shards] = []
    longer = []
    for manifest, row, others in zip(manifests, rows, reversed(rows), strict=True):
        known = {shard.content_digest for shard in others}
        within = sum(start < shorter for start, _ in _with_starts(row))
        differing.append([shard for shard in row[:within] if shard.content_digest not in known])
        if more := row[within:]:
            longer.append(f"{_count_samples(more)} more in {manifest.folder}, from {more[0].name} on")
    cut_alike = [shard.samples for shard in differing[0]] == [shard.samples for shard in differing[1]]
    read = [row[:MAX_READ] for row in differing] if cut_alike else differing
    unread = len(differing[0]) - len(read[0])
    if any(read):
        words = "not in the same shard of" if unread else "not in"
        found = _match_samples(manifests, split, read, words, workers, on_progress)
        yield from found
        if cut_alike and not found:
            shards = human_count(len(read[0]), "shard")
            yield f"content digests of {shards} differ, but the samples are the same; run 'fractalshards verify'"
    if unread:
        yield f"content digests of {human_count(unread, 'more shard')} differ; their samples were not compared"
    yield from longer


def _match_samples(
    manifests: Manifests, split: str, rows: Sequence[Shards], words: str, workers: int, on_progress: OnProgress
) -> list[str]:
    """Read some shards of both sides, and name the samples that differ or that one side lacks, a line per shard.

    Samples are paired by key. Shards are read in the order of their first samples, so that samples are soon paired, and
    few take memory. ``words`` say that the other side lacks a sample.
    """
    tasks: list[tuple[int, int, ShardIndex]] = []
    for side, (manifest, row) in enumerate(zip(manifests, rows, strict=True)):
        indices = {index.path.name: index for index in index_split(manifest, split)}
        tasks += [(start, side, indices[shard.name]) for start, shard in _with_starts(row)]
    unpaired: tuple[dict[str, tuple[str, list[str]]], ...] = ({}, {})  # shard and digests by key
    different: list[tuple[str, str]] = []  # shards of the first dataset, and samples
    done, total = 0, sum(shard.samples for row in rows for shard in row)
    with worker_pool(workers) as pool:
        futures = {
            pool.submit(digest_shard, index, manifests[side].classes): (side, index.path.name)
            for _, side, index in sorted(tasks, key=itemgetter(0))
        }
        for future in as_finished(futures):
            side, shard = futures.pop(future)  # frees the digests of a shard once they are matched
            samples = future.result()
            for key, *digests in samples:
                if key not in unpaired[1 - side]:
                    unpaired[side][key] = shard, digests
                    continue
                other_shard, others = unpaired[1 - side].pop(key)
                both = zip(("image", "label"), digests, others, strict=True)
                if fields := [name for name, one, other in both if one != other]:
                    different.append(((shard, other_shard)[side], f"{key} ({' and '.join(fields)})"))
            done += len(samples)
            on_progress(done, total)
    lines = list(_name_samples(different, "not the same"))
    for left, other in zip(unpaired, reversed(manifests), strict=True):
        lines += _name_samples(((shard, key) for key, (shard, _) in left.items()), f"{words} {other.folder}")
    return lines


def digest_shard(index: ShardIndex, classes: int) -> list[tuple[str, str, str]]:
    """Return key of each sample of a shard, and digests of the image and label bytes that enter its content digest.

    Raises a FractalError that names the first damaged sample.
    """
    digests = []
    for sample, pixels, _ in decode_shard(index, classes):
        image = xxhash.xxh3_128()
        for part in hashed_image(sample, pixels):
            image.update(part)
        label = xxhash.xxh3_128_hexdigest(sample.files[label_extension(sample.files)])
        digests.append((sample.key, image.hexdigest(), label))
    return digests


def _with_starts(row: Shards) -> Iterator[tuple[int, Shard]]:
    """Pair shards with the positions of their first samples, counted from the first shard."""
    return zip(accumulate((shard.samples for shard in row), initial=0), row, strict=False)


def _count_samples(row: Shards) -> str:
    return human_count(sum(shard.samples for shard in row), "sample")


def _name_samples(samples: Iterable[tuple[str, str]], what: str) -> Iterator[str]:
    """Name samples, each given as shard and key, in one line per shard."""
    for shard, group in groupby(sorted(samples), itemgetter(0)):
        keys = [key for _, key in group]
        yield f"{shard}: {human_count(len(keys), 'sample')} {what}: {human_list(keys, _MAX_KEYS)}"
