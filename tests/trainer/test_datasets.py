"""The public datasets: the samples of the shards in every form, rendered ones, fresh ones, and those kept in memory."""

import gc
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from damages import overwrite
from fractalgen import make_recipe
from fractalgen.render import RenderedSplit
from fractalshards import open_dataset
from fractalshards.errors import BadSampleError, FractalError, UsageError
from fractaltrain import EpochSampler, RenderedDataset, ShardDataset
from fractaltrain.data.memory import MappedSource

KINDS = ("single", "multi")


def identity(item):
    return item


def doubled(image):
    return image.astype(np.int32) * 2


def contents(dataset) -> list[tuple[bytes, object]]:
    samples = [dataset[index] for index in range(len(dataset))]
    return [(image.tobytes(), label if isinstance(label, int) else label.tolist()) for image, label in samples]


def test_script_that_keeps_a_dataset_ends_silently(built):
    code = (
        "import sys, fractalshards; from fractaltrain import ShardDataset; data = ShardDataset(sys.argv[1]); data[0]\n"
        "def keep(): return data"
    )
    ended = subprocess.run([sys.executable, "-c", code, built / "single"], text=True, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_hold_the_pixels_of_the_shards(kind, built):
    stored = open_dataset(built / kind)
    arrays = ShardDataset(built / kind, output="array")
    pictures, tensors = ShardDataset(built / kind), ShardDataset(str(built / kind), output="tensor")
    assert len(arrays) == len(stored) == 50
    assert [sample for number in range(3) for sample in stored.shard(number)][7][0].tobytes() == stored[7][0].tobytes()
    for index, (image, label) in enumerate(stored):
        array, shown = arrays[index]
        picture, tensor = pictures[index][0], tensors[index][0]
        assert isinstance(picture, Image.Image)
        assert (array.dtype, tensor.dtype, tensor.shape) == (np.uint8, torch.uint8, (3, 32, 32))
        for form in (array, np.asarray(picture), tensor.permute(1, 2, 0).numpy()):
            assert np.array_equal(form, image)
        if kind == "single":
            assert shown == label
        else:
            assert (shown.dtype, shown.nonzero().flatten().tolist()) == (torch.float32, list(label))
    for data in (stored, arrays):
        assert (data.classes, data.class_names, data.image_size, data.label_type) == (5, (), 32, kind)
    assert np.array_equal(ShardDataset(built / kind, transform=doubled, output="array")[3][0], doubled(stored[3][0]))


def test_threads_share_the_open_files(built):
    """A shard that one thread reads stays open while others open more of them."""
    expected = contents(ShardDataset(built / "single", output="array"))
    stored = open_dataset(built / "single")
    stored.files.limit = 1
    indices = np.random.default_rng(0).integers(0, len(stored), 4000).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda index: stored[index][0].tobytes(), indices))
    finally:
        sys.setswitchinterval(interval)
    assert read == [expected[index][0] for index in indices]


@pytest.mark.parametrize("kind", [*KINDS, "fractaldb"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_rendered_and_kept_samples_are_those_of_the_shards(kind, split, built, tmp_path):
    stored, rendered = open_dataset(built / kind, split), RenderedSplit(built / f"{kind}.json", split)
    assert (rendered.lengths, rendered.digest) == (stored.lengths, stored.manifest.recipe_digest)
    keys_and_labels = [[one.read(index)[::2] for index in range(len(stored))] for one in (stored, rendered)]
    assert keys_and_labels[0] == keys_and_labels[1]
    recipe, memory = built / f"{kind}.json", {"memory": True, "cache_dir": tmp_path}
    expected = contents(ShardDataset(built / kind, split, output="array"))
    assert contents(RenderedDataset(recipe, split, output="array")) == expected
    kept = ShardDataset(built / kind, split, output="array", **memory)
    assert contents(kept) == expected
    kept[0][0][:] = 0  # users may write into their images
    assert contents(kept) == expected
    assert contents(RenderedDataset(recipe, split, output="array", **memory)) == expected


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers_serve_fresh_epochs(start, built):
    """The indices carry the epoch, so workers that live on show new images in every epoch."""
    recipe = make_recipe("single", 50, val=10, classes=5, size=32, points=500, shard_size=20)
    data = RenderedDataset(recipe, fresh=True, output="tensor")
    sampler = EpochSampler(data, batch_size=10, window=2)
    options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": start}
    loader = DataLoader(data, batch_sampler=sampler, **options)
    images = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert sum(len(labels) for _, labels in batches) == 50
        images += [image.permute(1, 2, 0).numpy().tobytes() for batch, _ in batches for image in batch]
    stored = {image for image, _ in contents(ShardDataset(built / "single", output="array"))}
    assert set(images[:50]) == stored
    assert len(set(images)) == 150
    assert len(list(islice(data, 51))) == 50


@pytest.mark.parametrize(("start", "memory"), [("fork", False), ("fork", True), ("spawn", True)])
def test_loader_workers_read_what_one_process_reads(start, memory, built, tmp_path):
    data = ShardDataset(built / "multi", output="tensor", memory=memory, cache_dir=tmp_path if memory else None)
    sampler = EpochSampler(data, batch_size=6)
    expected = [[data[index] for index in batch] for batch in sampler]
    loader = DataLoader(data, batch_sampler=sampler, num_workers=2, multiprocessing_context=start)
    for (images, labels), batch in zip(loader, expected, strict=True):
        assert torch.equal(images, torch.stack([image for image, _ in batch]))
        assert torch.equal(labels, torch.stack([label for _, label in batch]))


def test_index_out_of_range(built, tmp_path):
    stored, rendered = ShardDataset(built / "single"), RenderedDataset(built / "single.json")
    kept = ShardDataset(built / "single", memory=True, cache_dir=tmp_path)
    for data, index in (
        *product((stored, rendered, kept), (50, -1, 10**9)),
        (RenderedDataset(built / "single.json", fresh=True), -1),
    ):
        with pytest.raises(IndexError):
            data[index]


def test_wrong_arguments_are_refused(built, tmp_path):
    for make, noun in (
        (lambda: ShardDataset(built / "single", output="jpeg"), "output"),
        (lambda: ShardDataset(built / "single", "test"), "test"),
        (lambda: ShardDataset(tmp_path / "nowhere"), "nowhere"),
        (lambda: ShardDataset(built / "single", memory=True, memory_size=1000, cache_dir=tmp_path), "memory"),
        (lambda: RenderedDataset(built / "single.json", fresh=True, memory=True), "fresh"),
        (lambda: RenderedDataset(built / "single" / "recipe.json"), "recipe.json"),
        (lambda: RenderedDataset(built / "single"), "folder"),
    ):
        with pytest.raises(FractalError, match=noun):
            make()
    assert not list(tmp_path.rglob("*.pixels"))


def test_dataset_that_changed_is_refused(tmp_path, write_dataset):
    folder = write_dataset(tmp_path / "data", (4, 4))
    data = ShardDataset(folder)
    data[0]
    second = folder / "train-000001.tar"
    second.write_bytes(second.read_bytes())  # the same bytes, but who knows
    assert np.asarray(data[1][0]).shape == (32, 32, 3)
    with pytest.raises(FractalError, match=r"train-000001\.tar"):
        data[4]
    assert len(contents(ShardDataset(folder, output="array"))) == 8


@pytest.mark.parametrize("samples", [1, 4])
def test_damaged_sample_is_named(samples, tmp_path, write_dataset):
    folder = write_dataset(tmp_path / "data", (samples,))
    tar = folder / "train-000000.tar"
    status = tar.stat()
    overwrite(tar, 700, bytes(20))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    kept = ShardDataset(folder, memory=True, cache_dir=tmp_path / "cache")
    for data in (ShardDataset(folder), kept):
        with pytest.raises(BadSampleError, match=r"train-000000\.tar"):
            data[0]
        assert [data[index][1] for index in range(1, samples)] == list(range(1, samples))


def test_url_is_read_through_the_cache_ahead_of_time(built, tmp_path, web, monkeypatch):
    server = web(built)
    local = ShardDataset(built / "single", output="array")
    remote = ShardDataset(f"{server.url}/single", output="array", cache_dir=tmp_path, cache_size=10**6)
    sampler = EpochSampler(remote, batch_size=10, window=1)
    loader = DataLoader(remote, batch_sampler=sampler, num_workers=1, collate_fn=identity)
    for batch, indices in zip(loader, EpochSampler(local, batch_size=10, window=1), strict=True):
        assert [image.tobytes() for image, _ in batch] == [local[index][0].tobytes() for index in indices]
    assert [server.count(f"train-00000{number}.tar") for number in range(3)] == [1, 1, 1]
    with pytest.raises(UsageError, match="cache"):
        EpochSampler(ShardDataset(f"{server.url}/single", cache_dir=tmp_path, cache_size=40_000), 10, window=3)
    copy = pickle.loads(pickle.dumps(remote))
    assert contents(copy) == contents(local)
    monkeypatch.delattr("fractaltrain.data.datasets.prefetching")  # what is in memory needs no shards
    kept = ShardDataset(f"{server.url}/single", cache_dir=tmp_path, memory=True)
    assert len(list(EpochSampler(kept, batch_size=10))) == 5


@pytest.mark.parametrize(("kind", "method"), [("single", "_open"), ("multi", "_fill")])
def test_memory_is_freed_while_another_dataset_opens(kind, method, built, tmp_path, monkeypatch):
    """Garbage that refers to itself is collected at any moment, also while this thread holds the lock."""
    unused = ShardDataset(built / "single", memory=True, cache_dir=tmp_path)
    unused.itself = unused
    del unused
    original, problems = getattr(MappedSource, method), []
    monkeypatch.setattr(MappedSource, method, lambda *arguments: (gc.collect(), original(*arguments)))
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    data = ShardDataset(built / kind, output="array", memory=True, cache_dir=tmp_path)
    assert contents(data) == contents(ShardDataset(built / kind, output="array"))
    assert problems == []


def test_memory_is_shared_and_removed(built, tmp_path):
    def files():
        return sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.suffix)

    first = ShardDataset(built / "single", memory=True, cache_dir=tmp_path)
    (pixels,) = tmp_path.rglob("*.pixels")
    filled = pixels.stat().st_mtime_ns
    second = ShardDataset(built / "single", memory=True, cache_dir=tmp_path)
    assert pixels.stat().st_mtime_ns == filled
    assert pixels.stat().st_size == 50 * 32 * 32 * 3
    del first
    assert files() == [".npz", ".pixels"]
    del second
    assert files() == []
    code = (
        "import os, sys; from fractaltrain import ShardDataset;"
        "data = ShardDataset(sys.argv[1], memory=True, cache_dir=sys.argv[2]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, built / "multi", tmp_path])
    assert files() == [".npz", ".pixels"]  # nobody could remove them
    third = ShardDataset(built / "single", memory=True, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.pixels")] == [f"{third.digest}-train.pixels"]
    subprocess.run([sys.executable, "-c", code, built / "multi", tmp_path])
    (stale,) = tmp_path.rglob(f"{ShardDataset(built / 'multi').digest}-train.pixels")
    stale.write_bytes(bytes(stale.stat().st_size))
    fourth = ShardDataset(built / "multi", output="array", memory=True, cache_dir=tmp_path)
    assert contents(fourth) == contents(ShardDataset(built / "multi", output="array"))
