"""``fractaltrain pt``: shards, model and recipe meet in the loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fractalshards.console import progress
from fractalshards.manifest import load_manifest
from fractalshards.sharing.cache import ShardCache, open_cache
from fractalshards.sharing.prefetch import prefetching
from fractalshards.sharing.urls import parse_location
from fractaltrain.data.shards import ShardSource
from fractaltrain.models import IMAGE_SIZE, create_model
from fractaltrain.settings import Pretraining, dataset_name
from fractaltrain.stream.ahead import Ahead
from fractaltrain.train import Job, train
from fractaltrain.world import World, join_world

_SPLIT = "train"


def pretrain(choice: Pretraining) -> None:
    """Pre-train on the ``train`` split, in each process of the world; evaluate on ``val`` where there is one.

    Raises:
        FractalError: as ``train`` does, or if the dataset is missing or damaged, or the model is not known.
    """
    with join_world() as world:
        cache = _prepared_cache(choice, world)
        manifest = cache.manifest if cache else load_manifest(Path(parse_location(choice.shards).root))
        training = ShardSource(manifest, _SPLIT, cache, choice.window if cache else 0)
        held_out = ShardSource(manifest, "val", cache, 1 if cache else 0) if "val" in manifest.splits else None
        image_size = choice.image_size or manifest.image_size or IMAGE_SIZE
        torch.manual_seed(choice.running.seed)
        model = create_model(choice.model, manifest.classes, image_size)
        with _fetching_ahead(cache, world) as want:
            names = [shard.name for shard in manifest.splits[_SPLIT]]
            job = Job(
                running=choice.running,
                model=model,
                training=training,
                window=choice.window,
                held_out=held_out,
                image_size=image_size,
                settings={
                    "task": "pt",
                    "dataset": dataset_name(choice.shards),
                    "dataset_digest": manifest.content_digest(),
                    "model": choice.model,
                    "classes": manifest.classes,
                },
                reached=Ahead(names, training.lengths, choice.running.seed, choice.window, want).reached,
            )
            train(job, world)


def _prepared_cache(choice: Pretraining, world: World) -> ShardCache | None:
    """The machine's cache of a dataset elsewhere, once one of the machine's processes has prepared it."""
    if choice.caching is None:
        return None
    cache = open_cache(choice.shards, choice.caching.folder, choice.caching.size, choice.window, _SPLIT)
    if world.local_rank == 0:
        cache.prepare(progress if world.main else _unseen)
    world.barrier()
    return cache


@contextmanager
def _fetching_ahead(cache: ShardCache | None, world: World) -> Iterator[Callable[[Sequence[str]], None]]:
    """One process of a machine has the shards fetched that all of them need next."""
    if cache is None or world.local_rank:
        yield lambda names: None
        return
    with prefetching(cache) as want:
        yield want


def _unseen(label: str, total: int, unit: str) -> Any:
    return nullcontext(lambda count: None)
