"""``fractaltrain pt``: shards, model and recipe meet in the loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fractalshards.console import old_progress as progress
from fractalshards.console import unseen
from fractalshards.manifest import TRAINING
from fractalshards.remote.cache import ShardCache, open_cache, prefetching
from fractalshards.remote.stores import parse_location
from fractaltrain.config import Pretraining, Running, dataset_name
from fractaltrain.data.shards import open_cached, open_dataset
from fractaltrain.distributed import World, join_world
from fractaltrain.models import IMAGE_SIZE, create_model
from fractaltrain.recipes import for_dataset
from fractaltrain.stream.loader import Ahead
from fractaltrain.stream.order import epoch_samples, node_positions
from fractaltrain.train import Job, train


def pretrain(choice: Pretraining) -> None:
    """Pre-train on the ``train`` split, in each process of the world; evaluate on ``val`` where there is one.

    Raises:
        FractalError: as ``train`` does, or if the dataset is missing or damaged, or the model is not known.
    """
    with join_world() as world:
        cache = _prepared_cache(choice, world)
        folder = Path(parse_location(choice.shards).root)
        dataset = open_cached(cache, choice.window) if cache else open_dataset(folder, world)
        running = replace(choice.running, recipe=for_dataset(choice.running.recipe, dataset.kind, choice.changed))
        stored = dataset.image_size if running.recipe.crop == "none" else None  # a crop has the usual size
        image_size = choice.image_size or stored or IMAGE_SIZE
        torch.manual_seed(running.seed)
        model = create_model(choice.model, dataset.classes, image_size, running.recipe.drop_path)
        nodes = world.nodes() if choice.nodes_split else 1
        with _fetching_ahead(cache, choice, running, dataset.training.lengths, nodes, world) as reached:
            job = Job(
                running=running,
                model=model,
                training=dataset.training,
                window=choice.window,
                held_out=dataset.held_out,
                image_size=image_size,
                settings={
                    "task": "pt",
                    "dataset": dataset_name(choice.shards),
                    "dataset_digest": dataset.digest,
                    "model": choice.model,
                    "classes": dataset.classes,
                    **({"nodes_split": nodes} if nodes > 1 else {}),
                },
                multi_label=dataset.multi_label,
                nodes=nodes,
                reached=reached,
            )
            train(job, world)


def _prepared_cache(choice: Pretraining, world: World) -> ShardCache | None:
    """The machine's cache of a dataset elsewhere, once one of the machine's processes has prepared it."""
    if choice.caching is None:
        return None
    cache = open_cache(choice.shards, choice.caching.folder, choice.caching.size, choice.window, TRAINING)
    with world.local_main_first():
        if world.local_rank == 0:
            cache.prepare(progress if world.main else unseen)
    return cache


@contextmanager
def _fetching_ahead(
    cache: ShardCache | None, choice: Pretraining, running: Running, lengths: Sequence[int], nodes: int, world: World
) -> Iterator[Callable[[int, int], None]]:
    """What shall be told which steps are done: one process of a machine has the shards fetched that all need next."""
    if cache is None or world.local_rank:
        yield lambda epoch, step: None
        return
    repeats, batch = running.recipe.repeats, running.recipe.batch_size
    node = world.rank * nodes // world.size
    part = node_positions(epoch_samples(sum(lengths), repeats), batch, node, nodes, running.pad)
    names = [shard.name for shard in cache.manifest.splits[TRAINING]]
    with prefetching(cache) as want:
        ahead = Ahead(names, lengths, running.seed, choice.window, repeats, want, part)
        yield lambda epoch, step: ahead.reached(epoch, part.start + step * batch // nodes)
