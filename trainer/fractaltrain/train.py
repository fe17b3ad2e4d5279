"""The training loop, for pre-training and fine-tuning alike. Read it from top to bottom."""

import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_count
from fractalshards.workers import available_cores
from fractaltrain.checkpoint import Position, load_checkpoint, save_checkpoint
from fractaltrain.data.source import Source
from fractaltrain.evaluation import evaluate
from fractaltrain.inputs import evaluation_geometry, training_batch, training_geometry
from fractaltrain.optim import build_optimizer, build_schedule
from fractaltrain.progress import ProgressLine
from fractaltrain.run_folder import append_metrics, open_run, rewind_metrics, write_result
from fractaltrain.settings import Amp, Running
from fractaltrain.stream.bad import BadSamples
from fractaltrain.stream.bits import Purpose, mix
from fractaltrain.stream.loader import Batches, Loading, OnBad, iterate
from fractaltrain.stream.order import (
    epoch_order,
    epoch_samples,
    evaluation_positions,
    repeated,
    steps_per_epoch,
    training_positions,
)
from fractaltrain.world import World

LOG_EVERY = 10
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Job:
    """What to train, on what.

    Attributes:
        model: with its starting weights, the same on every rank.
        training: its samples; ``window`` of its shards are shuffled together.
        held_out: evaluated after every epoch, where there is one.
        image_size: side in pixels of what the model sees.
        settings: JSON-like; what tells this run from others, see ``run_folder.open_run``.
    """

    running: Running
    model: nn.Module
    training: Source
    window: int
    held_out: Source | None
    image_size: int
    settings: Mapping[str, Any]


def train(job: Job, world: World) -> None:
    """Train to the end, from the start or from where the run's folder left off.

    The result is the run's folder: checkpoint after every epoch, metrics, ``result.json`` at the end.

    Raises:
        FractalError: if batch, samples and processes do not fit, the folder holds another run, a sample is damaged,
            or the loss is no longer a number.
    """
    running, recipe, device = job.running, job.running.recipe, world.device
    folder, seed, batch_size = running.out, running.seed, recipe.batch_size
    samples = epoch_samples(sum(job.training.lengths), recipe.repeats)
    steps = steps_per_epoch(samples, batch_size, running.pad)
    positions = training_positions(samples, batch_size, world.rank, world.size, running.pad)
    dtype = autocast_dtype(running.amp, device)
    loading = Loading(loader_workers(running.workers, world), pin_memory=device.type == "cuda")
    settings = {**job.settings, "recipe": asdict(recipe), "image_size": job.image_size, "window": job.window}
    settings |= {"seed": seed, "pad": running.pad, "precision": str(dtype)}

    if world.main:
        open_run(folder, settings, environment(world))
    world.barrier()

    model = job.model.to(device)
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe, recipe.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    position = Position()
    if saved := load_checkpoint(folder):
        position, state = saved
        for name, part in stateful.items():
            part.load_state_dict(state[name])
    if world.main:
        rewind_metrics(folder, position.epoch * steps + position.step)
    network = DistributedDataParallel(model) if world.size > 1 else model

    progress = ProgressLine(recipe.epochs, steps, batch_size, show=world.main)
    if saved and position.epoch < recipe.epochs:
        progress.say(f"{folder}: continuing at epoch {position.epoch + 1}, step {position.step}")
    saved_at = time.monotonic()

    while position.epoch < recipe.epochs:
        epoch = position.epoch
        order = repeated(epoch_order(job.training.lengths, seed, epoch, job.window), recipe.repeats)
        transform = training_geometry(recipe, job.image_size, device)
        on_bad: OnBad = "replace" if running.on_bad_sample == "skip" else "stop"
        batches = Batches(job.training, transform, positions, order, seed, epoch, on_bad)
        bad = BadSamples()
        loss_sum = torch.tensor(position.loss_sum, dtype=torch.float64, device=device)
        network.train()
        progress.start()
        for step, batch in enumerate(bad.noting(iterate(batches, position.step, loading)), position.step + 1):
            torch.manual_seed(mix(seed, Purpose.STEP, epoch, step, world.rank))  # dropout
            images, labels = training_batch(batch, recipe, job.training.classes, device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's backward has no types
            scaler.step(optimizer)
            scaler.update()
            lr = optimizer.param_groups[0]["lr"]
            schedule.step()
            loss_sum += world.sum(loss.detach().double()) / world.size
            progress.advance(1)
            if step % LOG_EVERY and step < steps:
                continue

            mean_loss = (float(loss_sum) - position.loss_sum) / (step - position.step)
            if not math.isfinite(mean_loss):
                raise FractalError(
                    f"the loss is {mean_loss} at epoch {epoch + 1}, step {step}, learning rate {lr:.3g}; "
                    f"lower --lr and start again in another folder (--out)"
                )
            position = replace(position, step=step, loss_sum=float(loss_sum))
            progress.print(epoch, step, mean_loss, lr)
            if world.main:
                rate = round(progress.images_per_second(), 1)
                where = {"epoch": epoch, "step": step, "global_step": epoch * steps + step}
                append_metrics(folder, {"split": "train", **where, "loss": mean_loss, "lr": lr, "images_per_s": rate})
                if step < steps and time.monotonic() - saved_at >= 60 * running.save_every_minutes:
                    save_checkpoint(folder, position, {name: part.state_dict() for name, part in stateful.items()})
                    saved_at = time.monotonic()
        progress.pause()

        summary = {"train_loss": position.loss_sum / steps}
        if running.on_bad_sample == "skip" and (replaced := bad.total(world)):
            summary["bad_samples"] = replaced
            progress.say(f"epoch {epoch + 1}/{recipe.epochs}  {replaced:,} bad samples, replaced by others")
        if job.held_out is not None:
            held_out = sum(job.held_out.lengths)
            shares = evaluation_positions(held_out, batch_size, world.rank, world.size)
            transform = evaluation_geometry(recipe, job.image_size)
            on_bad = "drop" if running.on_bad_sample == "skip" else "stop"
            batches = Batches(job.held_out, transform, shares, np.arange(held_out), seed, epoch, on_bad)
            scores = evaluate(model, BadSamples().noting(iterate(batches, 0, loading)), recipe, dtype, world)
            summary |= asdict(scores)
            progress.say(
                f"epoch {epoch + 1}/{recipe.epochs}  held out: top-1 {scores.top1:.2%}  top-5 {scores.top5:.2%}  "
                f"loss {scores.loss:.4f}  {scores.samples:,} images"
            )
        position = Position(epoch + 1, history=(*position.history, summary))
        if world.main:
            where = {"epoch": epoch, "step": steps, "global_step": (epoch + 1) * steps}
            append_metrics(folder, {"split": "epoch", **where, **summary})
            save_checkpoint(folder, position, {name: part.state_dict() for name, part in stateful.items()})
            saved_at = time.monotonic()

    result = final_result(position)
    if world.main:
        write_result(folder, result)
    progress.say(f"{folder}: {human_count(result['epochs'], 'epoch')} done, training loss {result['train_loss']:.4f}")
    if "top1" in result:
        progress.say(
            f"{folder}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} on {result['samples']:,} held-out "
            f"images (best top-1 {result['best_top1']:.2%} after epoch {result['best_epoch']})"
        )


def autocast_dtype(amp: Amp, device: torch.device) -> torch.dtype:
    """The precision of the forward pass; float32 means no autocast.

    Raises:
        UsageError: for float16 on a CPU, whose loss scaling nobody needs.
    """
    if amp == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; choose bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[amp]


def loader_workers(wanted: int | None, world: World) -> int:
    """Loader processes of each training process: as wanted, or the cores that training itself leaves idle."""
    if wanted is not None:
        return wanted
    if world.device.type == "cpu":
        return 0
    return max(min(available_cores() // world.local_size - 1, _MOST_WORKERS), 1)


def final_result(position: Position) -> dict[str, Any]:
    """``result.json``: the last epoch's figures, best top-1 and its epoch, counted from 1; shares in [0, 1]."""
    last = position.history[-1]
    result: dict[str, Any] = {"epochs": position.epoch, **last}
    if "top1" in last:
        best = max(range(position.epoch), key=lambda epoch: position.history[epoch]["top1"])
        result |= {"best_top1": position.history[best]["top1"], "best_epoch": best + 1}
    return result


def environment(world: World) -> dict[str, Any]:
    """What a run was computed with, for the record."""
    return {
        "processes": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
    }
