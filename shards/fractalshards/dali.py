"""Index files for NVIDIA DALI's WebDataset reader: where every file of every sample lies in its tar.

The text format is that of DALI's own indexer, version 1.2: a line ``v1.2 SAMPLES``, then for every sample a line with
``EXTENSION OFFSET SIZE NAME`` of each of its files, the offset being that of the file's first byte.
"""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise

from fractalshards.errors import FractalError
from fractalshards.manifest import Manifest, check_plain, dali_index_name
from fractalshards.reader import ShardIndex, index_split
from fractalshards.sample import BLOCK, Member, extension_of, sample_members
from fractalshards.storage import atomic_file

_VERSION = "v1.2"


def write_dali_indices(manifest: Manifest, advance: Callable[[int], None]) -> int:
    """Write an ``.idx`` file beside every shard, atomically; ``advance`` is called with the samples of each.

    Returns:
        The number of files written.

    Raises:
        FractalError: if a shard or sidecar is missing or damaged, or a member has a name that the format cannot hold.
        OSError: as the file system does.
    """
    shards = [shard for split in manifest.splits for shard in index_split(manifest, split)]
    for shard in shards:
        with atomic_file(shard.path.with_name(dali_index_name(shard.path.name))) as file:
            for line in _lines(shard):
                file.write(line.encode("ascii") + b"\n")
        advance(len(shard.offsets) - 1)
    return len(shards)


def _lines(shard: ShardIndex) -> Iterator[str]:
    offsets = shard.offsets.tolist()
    yield f"{_VERSION} {len(offsets) - 1}"
    with shard.path.open("rb") as file:
        descriptor = file.fileno()
        for start, end in pairwise(offsets):
            try:
                members = sample_members(lambda at: os.pread(descriptor, BLOCK, at), start, end)
                yield " ".join(_component(member) for member in members)
            except FractalError as error:
                raise FractalError(f"{shard.path}: at byte {start:,}: {error}; fetch or build it again") from error


def _component(member: Member) -> str:
    name = check_plain(member.name, "member of the tar")
    return f"{extension_of(name)} {member.start} {member.size} {name}"
