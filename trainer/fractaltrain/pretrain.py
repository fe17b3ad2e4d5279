"""``fractaltrain pt``: pre-train a model on a dataset of shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fractalshards.manifest import TRAINING
from fractalshards.remote.cache import ShardCache, open_cache, prefetching
from fractalshards.remote.stores import parse_location
from fractaltrain.config import ShardsConfig, TrainConfig
from fractaltrain.data.shards import open_cached, open_dataset
from fractaltrain.data.source import Splits
from fractaltrain.distributed import World, join_world
from fractaltrain.models import IMAGE_SIZE, create_model
from fractaltrain.stream.loader import PrefetchSchedule
from fractaltrain.stream.order import epoch_samples, node_positions
from fractaltrain.train import train


def pretrain(config: TrainConfig) -> None:
    """Pre-train on the ``train`` split; evaluate on ``val``, if the dataset has it. Runs in every rank.

    Raises:
        FractalError: as ``train`` does, or if the dataset is missing or damaged, or the model is unknown.
    """
    data_config, recipe = config.data, config.recipe
    assert isinstance(data_config, ShardsConfig)
    with join_world() as world:
        cache = _open_cache(data_config, world) if data_config.is_remote else None
        if cache is None:
            data = open_dataset(Path(parse_location(data_config.location).root), world, data_config.tars)
        else:
            data = open_cached(cache, data_config.window)
        stored_size = data.image_size if recipe.crop == "none" else None  # with crops, the default size
        image_size = config.model.image_size or stored_size or IMAGE_SIZE
        torch.manual_seed(config.run.seed)
        model = create_model(config.model.name, data.train.classes, image_size, recipe.drop_path)
        nodes = world.nodes() if data_config.nodes_split else 1
        facts = {
            "task": "pt",
            "dataset": data_config.name,
            "dataset_digest": data.digest,
            "model": config.model.name,
            "classes": data.train.classes,
            **({"nodes_split": nodes} if nodes > 1 else {}),
        }
        with _prefetching(cache, config, data, nodes, world) as on_step:
            train(config, model, data, image_size, facts, world, nodes, on_step)


def _open_cache(config: ShardsConfig, world: World) -> ShardCache:
    """Open this machine's cache of a remote dataset; one process of the machine prepares it."""
    cache = open_cache(config.location, config.cache_dir, config.cache_size, config.window, TRAINING)
    with world.local_main_first():
        if world.local_rank == 0:
            cache.prepare()
    return cache


@contextmanager
def _prefetching(
    cache: ShardCache | None, config: TrainConfig, data: Splits, nodes: int, world: World
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function for ``train`` to call on every step: one process of a machine prefetches its next shards."""
    if cache is None or world.local_rank:
        yield lambda epoch, step: None
        return
    lengths, repeats, batch = data.train.lengths, config.recipe.repeats, config.recipe.batch_size
    node = world.rank * nodes // world.size
    part = node_positions(epoch_samples(sum(lengths), repeats), batch, node, nodes, config.run.pad)
    names = [shard.name for shard in cache.manifest.splits[TRAINING]]
    schedule = PrefetchSchedule(lengths, config.run.seed, config.window, repeats, part)
    requested: tuple[int, ...] = ()
    with prefetching(cache) as request:

        def on_step(epoch: int, step: int) -> None:
            nonlocal requested
            shards = schedule.shards(epoch, part.start + step * batch // nodes)
            if shards != requested:
                requested = shards
                request([names[shard] for shard in shards])

        yield on_step
