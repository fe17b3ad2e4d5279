"""The training loop, for pre-training and fine-tuning alike: load a batch, take a step, log, save, stop."""

import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_list
from fractaltrain.checkpoint import Position, checkpoint_path, load_checkpoint, restore, save_checkpoint
from fractaltrain.config import RunConfig, TrainConfig
from fractaltrain.data.source import SampleSource, Splits
from fractaltrain.distributed import StopFlag, World, stop_on_signal, stopped_by
from fractaltrain.evaluate import describe_scores, predict
from fractaltrain.log import RunLog
from fractaltrain.models import set_training
from fractaltrain.recipes.recipe import check_batch
from fractaltrain.run_folder import open_run, write_result
from fractaltrain.seeding import Purpose, mix
from fractaltrain.state import TrainState, build_state, train_step
from fractaltrain.stream.loader import epoch_loader
from fractaltrain.stream.order import (
    epoch_order,
    epoch_samples,
    evaluation_positions,
    repeated,
    steps_per_epoch,
    training_positions,
)
from fractaltrain.transforms import train_batch, train_transform, val_transform

LOG_EVERY = 10  # steps
_EVAL_BATCH = 64  # images of one rank, at least: without gradients a small training batch would only be slow

_logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    model: nn.Module,
    data: Splits,
    image_size: int,
    facts: Mapping[str, Any],
    world: World,
    nodes: int = 1,
    on_step: Callable[[int, int], None] = lambda epoch, step: None,
) -> None:
    """Train to the end, from the start or from where the run's folder left off.

    Writes the run's folder: ``run.json``, checkpoints, metrics, ``history.png`` and at the end ``result.json``. Only
    rank 0 reads and writes it.

    Args:
        model: with its starting weights, the same on every rank.
        image_size: side in pixels of the square images the model sees.
        facts: settings for ``run.json`` that are not in ``config``, see ``TrainConfig.settings``.
        nodes: machines that share out an epoch's shards among them; 1: they do not.
        on_step: called with the epoch and the number of its steps that are done, before the first and after every step.

    Raises:
        FractalError: if batch, samples and processes do not fit, the folder holds another run, a sample is damaged, or
            the loss is not finite.
        StoppedError: if a signal asked for it; the checkpoint is written.
    """
    recipe, run = config.recipe, config.run
    samples = epoch_samples(sum(data.train.lengths), recipe.repeats)
    check_batch(recipe, world.size, run.accumulate, samples)
    steps = steps_per_epoch(samples, recipe.batch_size, run.pad)
    positions = training_positions(samples, recipe.batch_size, world.rank, world.size, run.pad, nodes)
    transform = train_transform(recipe, image_size)
    loading = loading_options(run, world)
    state = build_state(model, recipe, run, data.multi_label, steps, world)
    settings = config.settings(str(state.dtype), image_size, **facts)
    position, resumed = resume(settings, run, state, world)
    log = RunLog(run.out, recipe.epochs, steps, recipe.batch_size, position, world.main, run.quiet)
    for message in resumed:
        log.message(message)
    saved_at = time.monotonic()

    with log, stop_on_signal() as stop:
        for epoch in range(position.epoch, recipe.epochs):
            order = repeated(epoch_order(data.train.lengths, run.seed, epoch, config.window), recipe.repeats)
            loader = epoch_loader(
                data.train, transform, positions, order, run.seed, epoch, start=position.step, **loading
            )
            loss_sum = torch.tensor(position.loss_sum, dtype=torch.float64, device=world.device)
            bad_samples = 0
            recent: list[StepRecord] = []
            set_training(state.model)
            on_step(epoch, position.step)
            log.timer.start()
            with closing(loader):
                for step, batch in enumerate(loader, position.step + 1):
                    log.timer.loaded()
                    torch.manual_seed(mix(run.seed, Purpose.STEP, epoch, step, world.rank))  # dropout
                    lr = state.lr
                    loss = train_step(state, *train_batch(batch, recipe, data.train.classes, world.device))
                    recent.append(StepRecord(step, lr, loss, batch.keys))
                    loss_sum += world.sum(loss.double()) / world.size
                    if batch.bad and not bad_samples:
                        _logger.warning("bad sample, going on without it: %s", batch.bad[0])
                    bad_samples += len(batch.bad)
                    on_step(epoch, step)
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
                        save(run, position, state, world)
                        saved_at = time.monotonic()
                        log.timer.start()

            summary: dict[str, Any] = {"train_loss": position.loss_sum / steps}
            if position.bad_samples:
                summary["bad_samples"] = position.bad_samples
                log.message(f"epoch {epoch + 1}: {human_count(position.bad_samples, 'bad sample')} replaced by others")
            if data.val is not None and is_evaluated(epoch, recipe.epochs, run.eval_every):
                scores = evaluate_epoch(config, state, data.val, data.multi_label, image_size, world, stop)
                if stopping := world.max(stop.signal):
                    save_and_stop(run, position, state, world, log, stopping)
                summary |= scores
                log.message(f"epoch {epoch + 1}/{recipe.epochs}  {describe_scores(scores)}")
            position = Position(epoch + 1, history=(*position.history, summary))
            log.epoch(epoch, summary)
            save(run, position, state, world)
            saved_at = time.monotonic()

    if world.main:
        result = final_result(position)
        write_result(run.out, result)
        print(*(f"{run.out}: {line}" for line in describe_result(result)), sep="\n", flush=True)


def resume(
    settings: Mapping[str, Any], run: RunConfig, state: TrainState, world: World
) -> tuple[Position, Sequence[str]]:
    """Open the run's folder and load its newest checkpoint into ``state``; return where to go on, and messages."""
    checkpoint = None
    if world.main:
        open_run(run.out, settings, environment(run, world), run.resume)
        checkpoint = load_checkpoint(run.out, to_continue=True)
    checkpoint = world.share(checkpoint)
    if checkpoint is None:
        return Position(), ()
    restore(checkpoint, state.parts())
    position = checkpoint.position
    finished = position.epoch >= settings["recipe"]["epochs"]
    message = "was already finished" if finished else f"continuing at {position}"
    skipped = [f"{problem}; using the one before" for problem in checkpoint.skipped]
    return position, (*skipped, f"{run.out}: {message}")


def save(run: RunConfig, position: Position, state: TrainState, world: World) -> None:
    """Save a checkpoint, on rank 0."""
    if world.main:
        save_checkpoint(run.out, position, state.parts(), run.keep)


def save_and_stop(
    run: RunConfig, position: Position, state: TrainState, world: World, log: RunLog, signal: int
) -> NoReturn:
    """Save a checkpoint and raise the error that ends a stopped run. Collective."""
    save(run, position, state, world)
    world.barrier()  # no rank ends while another one saves
    log.message(f"{run.out}: saved at {position}, as {checkpoint_path(run.out, position).name}")
    raise stopped_by(signal)


def evaluate_epoch(
    config: TrainConfig,
    state: TrainState,
    val: SampleSource,
    multi_label: bool,
    image_size: int,
    world: World,
    stop: StopFlag,
) -> dict[str, float]:
    """Evaluate the val split; return its scores on all ranks, nothing if a signal ended it. Collective.

    Raises:
        FractalError: if the loss is not finite.
    """
    recipe, run = config.recipe, config.run
    count = sum(val.lengths)
    batch_size = max(recipe.batch_size, _EVAL_BATCH * world.size)
    positions = evaluation_positions(count, batch_size, world.rank, world.size)
    loading = loading_options(run, world, replace_bad=False)
    with closing(
        epoch_loader(val, val_transform(recipe, image_size), positions, np.arange(count), 0, 0, **loading)
    ) as loader:
        predictions = predict(state.evaluated, loader, recipe, state.dtype, val.classes, multi_label, world, stop)
    scores = world.share(predictions.scores() if predictions else {})
    if scores and not math.isfinite(scores["loss"]):
        raise FractalError(
            f"the loss on the val split is {scores['loss']}; lower --lr or limit the gradients (--set clip_grad=1), "
            "and start again in another folder (--out)"
        )
    return scores


def is_evaluated(epoch: int, epochs: int, eval_every: int) -> bool:
    """Return whether the val split is evaluated after an epoch, counted from 0."""
    return (epoch + 1) % eval_every == 0 or epoch + 1 == epochs


def loading_options(run: RunConfig, world: World, replace_bad: bool = True) -> dict[str, Any]:
    """Return how batches are loaded, as arguments of ``epoch_loader``; none of it changes what is in them."""
    return {
        "workers": world.loader_workers(run.workers),
        "pin_memory": world.device.type == "cuda",
        "on_bad": "stop" if run.on_bad_sample == "stop" else "replace" if replace_bad else "drop",
    }


class StepRecord(NamedTuple):
    """A step: this rank's own loss, still on the device, and the samples it was computed on."""

    step: int
    lr: float
    loss: torch.Tensor
    keys: tuple[str, ...]


def divergence(recent: Sequence[StepRecord], epoch: int, world: World) -> FractalError:
    """Return the error of a loss that is not finite: the first such step, and the samples of all ranks. Collective."""
    mine = [(record.step, record.lr, float(record.loss), record.keys) for record in recent]
    first = next((record for record in mine if not math.isfinite(record[2])), None)
    found = [record for record in world.gather(first) if record]
    step, lr, loss, _ = min(found)
    keys = [key for other, _, _, some in found if other == step for key in some]
    return FractalError(
        f"the loss is {loss} at epoch {epoch + 1}, step {step}, learning rate {lr:.3g}, on the samples "
        f"{human_list(keys)}; lower --lr or limit the gradients (--set clip_grad=1), and start again in another folder "
        "(--out)"
    )


def final_result(position: Position) -> dict[str, Any]:
    """Return ``result.json``: the last epoch's figures, and the best top-1 or mAP with its epoch, counted from 1."""
    last = position.history[-1]
    result: dict[str, Any] = {"epochs": position.epoch, **last}
    leading = next((name for name in ("top1", "map") if name in last), None)
    if leading:
        evaluated = (epoch for epoch in range(position.epoch) if leading in position.history[epoch])
        best = max(evaluated, key=lambda epoch: position.history[epoch][leading])
        result |= {f"best_{leading}": position.history[best][leading], "best_epoch": best + 1}
    return result


def describe_result(result: Mapping[str, Any]) -> list[str]:
    """Return ``result.json`` in words: training, then evaluation if there was one."""
    lines = [f"{human_count(result['epochs'], 'epoch')} done, training loss {result['train_loss']:.4f}"]
    best = result.get("best_top1", result.get("best_map"))
    if best is not None:
        lines.append(f"{describe_scores(result)} (best {best:.2%} after epoch {result['best_epoch']})")
    return lines


def environment(run: RunConfig, world: World) -> dict[str, Any]:
    """Return what a run is computed with, for the record."""
    return {
        "processes": world.size,
        "accumulate": run.accumulate,
        "compile": run.compile,
        "deterministic": run.deterministic,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
    }
