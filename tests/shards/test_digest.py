"""The digests are those that shards/README.md specifies, computed here anew from its words."""

import json
from pathlib import Path

import numpy as np
import xxhash

from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.manifest import load_manifest, read_record
from fractalshards.png import decode_image
from fractalshards.reader import index_split, iterate_shard
from fractalshards.systems import read_systems


def test_content_of_a_shard(dataset: Path) -> None:
    hashed = b""
    for sample in iterate_shard(index_split(load_manifest(dataset), "train")[1]):
        pixels = decode_image(sample.files["png"])
        hashed += sample.key.encode() + b"\x00" + b"16x16" + b"\x00" + pixels.tobytes() + b"\x00"
        hashed += sample.files["cls"] + b"\x00"
    assert read_record(dataset, "train-000001.tar", "single").content_digest == xxhash.xxh3_128_hexdigest(hashed)


def test_content_of_a_dataset(dataset: Path) -> None:
    digests = [read_record(dataset, f"train-00000{shard}.tar", "single").content_digest for shard in range(2)]
    text = json.dumps({"train": digests}, separators=(",", ":"))
    assert load_manifest(dataset).content_digest() == xxhash.xxh3_128_hexdigest(text.encode())


def test_recipe() -> None:
    recipe = {"size": 224, "kind": "single", "jitter": [0.8, 1e-05], "name": "é"}
    canonical = b'{"jitter":[0.8,1e-05],"kind":"single","name":"\\u00e9","size":224}'
    assert mapping_digest(recipe) == xxhash.xxh3_128_hexdigest(canonical)


def test_systems(dataset: Path) -> None:
    systems = read_systems(dataset / "systems.npz")
    hashed = b"".join(b"2x2x3\x00" + np.asarray(system, "<f8").tobytes() for system in systems)
    assert systems_digest(systems) == xxhash.xxh3_128_hexdigest(hashed)
