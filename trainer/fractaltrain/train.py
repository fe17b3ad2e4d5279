"""The training loop, for pre-training and fine-tuning alike: load a batch, take a step, log, save, stop."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_list
from fractaltrain.checkpoint import Position, checkpoint_path, resume, save_checkpoint
from fractaltrain.config import RunConfig, TrainConfig
from fractaltrain.data.source import SampleSource, Splits
from fractaltrain.distributed import World, stop_on_signal, stopped_by
from fractaltrain.evaluate import describe_scores, evaluate
from fractaltrain.log import RunLog
from fractaltrain.models import describe_border, set_training
from fractaltrain.optim import TrainState, build_state, train_step
from fractaltrain.seeding import Purpose, mix
from fractaltrain.stream.loader import epoch_loader
from fractaltrain.stream.order import (
    check_batch,
    epoch_order,
    epoch_samples,
    repeated,
    steps_per_epoch,
    training_positions,
)
from fractaltrain.transforms import train_batch, train_transform

LOG_EVERY = 10  # steps
_logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    model: nn.Module,
    data: Splits[SampleSource],
    image_size: int,
    facts: Mapping[str, Any],
    world: World,
    nodes: int = 1,
    on_step: Callable[[int, int], None] = lambda epoch, step: None,
) -> None:
    """Train to the end, from the start or from the newest checkpoint in the run's folder.

    Rank 0 reads and writes the folder: ``run.json``, checkpoints, metrics, ``history.png``, and ``result.json`` at the
    end.

    Args:
        model: with its starting weights, the same on every rank.
        image_size: side in pixels of the square images the model sees.
        facts: settings for ``run.json`` that are not in ``config``, see ``TrainConfig.settings``.
        nodes: number of machines that divide an epoch's shards among themselves; 1: they do not.
        on_step: called with the epoch and the number of its steps that are done, before the first and after every step.

    Raises:
        FractalError: if batch, samples and processes do not fit, the folder holds another run, a sample is damaged, or
            the loss is not finite.
        StoppedError: if a signal stopped the run; the checkpoint is written.
    """
    recipe, run, window, fresh = config.recipe, config.run, config.data.window, config.data.fresh
    samples = epoch_samples(sum(data.train.lengths), recipe.repeats, recipe.passes)
    check_batch(recipe, world.size, run.accumulate, samples)
    steps = steps_per_epoch(samples, recipe.batch_size, run.pad)
    positions = training_positions(samples, recipe.batch_size, world.rank, world.size, run.pad, nodes)
    transform = train_transform(recipe, image_size)
    border = describe_border(model, image_size)
    state = build_state(model, recipe, run, data.multi_label, steps, world)
    settings = config.settings(str(state.dtype), image_size, **facts)
    with (
        resume(run, settings, state.parts(), world) as (position, resumed),
        RunLog(run.out, recipe.epochs, steps, recipe.batch_size, position, world.main, run.quiet) as log,
        stop_on_signal() as stop,
    ):
        for message in (*border, *resumed):
            log.message(message)
        saved_at = time.monotonic()
        for epoch in range(position.epoch, recipe.epochs):
            passes = epoch_order(data.train.lengths, run.seed, epoch, window, recipe.passes, fresh)
            order = repeated(passes, recipe.repeats)
            loader = epoch_loader(
                data.train, transform, positions, order, run.seed, epoch, start=position.step,
                workers=world.loader_workers(run.workers), pin_memory=world.device.type == "cuda",
                on_bad="stop" if run.on_bad_sample == "stop" else "replace",
            )  # fmt: skip
            loss_sum = torch.tensor(position.loss_sum, dtype=torch.float64, device=world.device)
            bad_samples = 0
            recent: list[tuple[int, float, torch.Tensor, tuple[str, ...]]] = []
            set_training(state.model)
            on_step(epoch, position.step)
            log.timer.start()
            with closing(loader):
                for step, batch in enumerate(loader, position.step + 1):
                    log.timer.loaded()
                    torch.manual_seed(mix(run.seed, Purpose.STEP, epoch, step, world.rank))  # dropout
                    lr = state.lr
                    loss = train_step(state, *train_batch(batch, recipe, data.train.classes, world.device))
                    recent.append((step, lr, loss, batch.keys))
                    loss_sum += world.sum(loss.double()) / world.size
                    if batch.bad and not bad_samples and not position.bad_samples:
                        _logger.warning("bad sample, continuing without it: %s", batch.bad[0])
                    bad_samples += len(batch.bad)
                    on_step(epoch, step)
                    stop.check_interrupt()
                    stopping = world.max(stop.signal)
                    logging_now = step % LOG_EVERY == 0 or step == steps
                    log.timer.stepped()
                    if not (logging_now or stopping):
                        continue

                    position = replace(position, step=step, loss_sum=float(loss_sum))
                    if run.on_bad_sample == "skip":
                        found = world.sum(torch.tensor(bad_samples, device=world.device))
                        position = replace(position, bad_samples=position.bad_samples + int(found))
                        bad_samples = 0
                    if not math.isfinite(position.loss_sum):
                        raise divergence(recent, epoch, world)
                    if logging_now:
                        recent.clear()
                        mean_loss = (position.loss_sum - position.logged_sum) / ((step - 1) % LOG_EVERY + 1)
                        position = replace(position, logged_sum=position.loss_sum)
                        log.step(epoch, step, mean_loss, lr)
                    if stopping:
                        save_and_stop(run, position, state, world, log, stopping)
                    if step < steps and time.monotonic() - saved_at >= 60 * run.save_every_minutes:
                        save_checkpoint(run, position, state.parts(), world)
                        saved_at = time.monotonic()
                        log.timer.start()

            summary: dict[str, Any] = {"train_loss": position.loss_sum / steps}
            if position.bad_samples:
                summary["bad_samples"] = position.bad_samples
                log.message(f"epoch {epoch + 1}: {human_count(position.bad_samples, 'bad sample')} replaced by others")
            last = epoch + 1 == recipe.epochs
            if data.val is not None and (last or (epoch + 1) % run.eval_every == 0):
                scores = evaluate(config, state.evaluated, data.val, image_size, state.dtype, world, stop)
                if stopping := world.max(stop.signal):
                    save_and_stop(run, position, state, world, log, stopping)
                summary |= scores
                log.message(f"epoch {epoch + 1}/{recipe.epochs}  {describe_scores(scores)}")
            position = Position(epoch + 1, history=(*position.history, summary))
            log.epoch(epoch, summary)
            save_checkpoint(run, position, state.parts(), world)
            saved_at = time.monotonic()
        log.result(position)


def save_and_stop(
    run: RunConfig, position: Position, state: TrainState, world: World, log: RunLog, signal: int
) -> NoReturn:
    """Save a checkpoint and raise the error that ends a stopped run. Collective."""
    save_checkpoint(run, position, state.parts(), world)
    world.barrier()  # no rank ends while another one saves
    log.message(f"{run.out}: saved at {position}, as {checkpoint_path(run.out, position).name}")
    raise stopped_by(signal)


def divergence(
    recent: Sequence[tuple[int, float, torch.Tensor, tuple[str, ...]]], epoch: int, world: World
) -> FractalError:
    """Return the error of a loss that is not finite: the first such step, and the samples of all ranks. Collective.

    Args:
        recent: step, learning rate, this rank's loss and the keys of its samples, for each step since the last check.
    """
    mine = [(step, lr, float(loss), keys) for step, lr, loss, keys in recent]
    first = next((record for record in mine if not math.isfinite(record[2])), None)
    found = [record for record in world.gather(first) if record]
    step, lr, loss, _ = min(found)
    keys = [key for other, _, _, some in found if other == step for key in some]
    return FractalError(
        f"the loss is {loss} at epoch {epoch + 1}, step {step}, learning rate {lr:.3g}, on the samples "
        f"{human_list(keys)}; lower --lr or limit the gradients (--set clip_grad=1), and start again in another folder "
        "(--out)"
    )
