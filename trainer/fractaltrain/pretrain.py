"""``fractaltrain pt``: pre-train a model on shards or on rendered images."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from fractalshards.manifest import TRAINING
from fractalshards.remote.cache import ShardCache, cache_root, open_cache, prefetching
from fractaltrain.config import DatasetConfig, TrainConfig
from fractaltrain.data.memory import keep_in_memory
from fractaltrain.data.rendered import open_rendered_splits
from fractaltrain.data.shards import open_cached, open_shards
from fractaltrain.data.source import SampleSource, Splits
from fractaltrain.distributed import World, join_world
from fractaltrain.models import IMAGE_SIZE, create_model
from fractaltrain.stream.order import PrefetchSchedule, epoch_samples, node_positions
from fractaltrain.train import train


def pretrain(config: TrainConfig) -> None:
    """Pre-train on the ``train`` split; evaluate on ``val``, if the dataset has it. Runs in every rank.

    Raises FractalError as ``train`` does, or if the dataset is missing or damaged, or the model is unknown.
    """
    data_config, recipe = config.data, config.recipe
    assert isinstance(data_config, DatasetConfig)
    with join_world() as world, ExitStack() as stack:
        cache: ShardCache | None = None
        data: Splits[SampleSource]
        if data_config.rendered:
            data = open_rendered_splits(data_config.path, data_config.fresh)
        elif data_config.is_remote:
            limits = data_config.cache_size, data_config.window
            cache = open_cache(data_config.location, data_config.cache_dir, *limits, TRAINING)
            if world.local_rank == 0:
                cache.prepare()
            world.barrier()
            data = open_cached(cache, data_config.window)
        else:
            data = open_shards(data_config.path, world, data_config.tars)
        if data_config.memory_size is not None:
            root = cache_root(data_config.cache_dir)
            data = stack.enter_context(keep_in_memory(data, root, data_config.memory_size, str(data.digest)))
        stored_size = data.image_size if recipe.crop == "none" else None  # with crops, the default size
        image_size = config.model.image_size or stored_size or IMAGE_SIZE
        torch.manual_seed(config.run.seed)
        arguments = dict(config.model.arguments)
        model = create_model(config.model.name, data.train.classes, image_size, recipe.drop_path, arguments)
        nodes = world.nodes() if data_config.nodes_split else 1
        facts = {
            "task": "pt",
            "dataset": data_config.name,
            "dataset_digest": data.digest,
            **({"dataset_recipe": data.recipe} if data.recipe else {}),
            "model": config.model.name,
            **({"model_args": arguments} if arguments else {}),
            "classes": data.train.classes,
            **({"fresh": True} if data_config.fresh else {}),
            **({"nodes_split": nodes} if nodes > 1 else {}),
        }
        streamed = cache if data_config.memory_size is None else None
        with _prefetching(streamed, config, data, nodes, world) as on_step:
            train(config, model, data, image_size, facts, world, nodes, on_step)


@contextmanager
def _prefetching(
    cache: ShardCache | None, config: TrainConfig, data: Splits[SampleSource], nodes: int, world: World
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function for ``train`` to call on every step: one process of each machine prefetches its next shards."""
    if cache is None or world.local_rank:
        yield lambda epoch, step: None
        return
    lengths, recipe, batch = data.train.lengths, config.recipe, config.recipe.batch_size
    node = world.rank * nodes // world.size
    samples = epoch_samples(sum(lengths), recipe.repeats, recipe.passes)
    part = node_positions(samples, batch, node, nodes, config.run.pad)
    schedule = PrefetchSchedule(lengths, config.run.seed, config.data.window, recipe.repeats, recipe.passes, part)
    with prefetching(cache, TRAINING) as request:
        yield lambda epoch, step: request(schedule.shards(epoch, part.start + step * batch // nodes))
