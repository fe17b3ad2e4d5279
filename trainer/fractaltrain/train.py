"""The training loop, for pre-training and fine-tuning alike. Read it from top to bottom."""

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_list
from fractalshards.workers import available_cores
from fractaltrain.board import Board
from fractaltrain.checkpoint import Position, load_checkpoint, restore, save_checkpoint
from fractaltrain.compute import autocast_dtype, compiled, memory_format, set_determinism
from fractaltrain.data.source import Source
from fractaltrain.evaluation import evaluate
from fractaltrain.history import History
from fractaltrain.inputs import evaluation_geometry, training_batch, training_geometry
from fractaltrain.models import set_training
from fractaltrain.optim import build_optimizer, build_schedule
from fractaltrain.preemption import stop_signals, stopped
from fractaltrain.progress import Clock, ProgressLine
from fractaltrain.run_folder import append_metrics, open_run, rewind_metrics, write_result
from fractaltrain.settings import Running
from fractaltrain.step import Step, check_accumulate
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
        reached: told the epoch and the position in its order that training has come to, before its first step and after
            every step; datasets that lie elsewhere are fetched ahead of it.
    """

    running: Running
    model: nn.Module
    training: Source
    window: int
    held_out: Source | None
    image_size: int
    settings: Mapping[str, Any]
    reached: Callable[[int, int], None] = lambda epoch, position: None


def train(job: Job, world: World) -> None:
    """Train to the end, from the start or from where the run's folder left off.

    The result is the run's folder: checkpoints, metrics, ``history.png``, ``result.json`` at the end. Only rank 0 reads
    and writes it.

    Raises:
        FractalError: if batch, samples and processes do not fit, the folder holds another run, a sample is damaged,
            or the loss is no longer a number.
        StoppedError: if a signal asked for it; the checkpoint is written.
    """
    running, recipe, device = job.running, job.running.recipe, world.device
    folder, seed, batch_size = running.out, running.seed, recipe.batch_size
    samples = epoch_samples(sum(job.training.lengths), recipe.repeats)
    steps = steps_per_epoch(samples, batch_size, running.pad)
    positions = training_positions(samples, batch_size, world.rank, world.size, running.pad)
    check_accumulate(batch_size // world.size, running.accumulate)
    dtype = autocast_dtype(running.amp, device)
    set_determinism(running.deterministic)
    loading = Loading(loader_workers(running.workers, world), pin_memory=device.type == "cuda")
    settings = {**job.settings, "recipe": asdict(recipe), "image_size": job.image_size, "window": job.window}
    settings |= {"seed": seed, "pad": running.pad, "precision": str(dtype)}

    saved = None
    if world.main:
        open_run(folder, settings, environment(running, world), running.resume)
        saved = load_checkpoint(folder)
    saved = world.share(saved)

    layout = memory_format(job.model, device)
    model = job.model.to(device, memory_format=layout)  # type: ignore[call-overload]  # as its documentation has it
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe, recipe.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    position = Position()
    if saved:
        restore(saved, stateful)
        position = saved.position
    wrapped = DistributedDataParallel(model) if world.size > 1 else None
    network: nn.Module = model if wrapped is None else wrapped
    take_step = Step(
        network=compiled(network) if running.compile else network,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        dtype=dtype,
        layout=layout,
        accumulate=running.accumulate,
        clip_grad=recipe.clip_grad,
    )

    progress, clock = ProgressLine(recipe.epochs, steps, show=world.main), Clock(batch_size)
    for problem in saved.passed_over if saved else ():
        progress.say(f"{problem}; taking the one before")
    if saved and position.epoch < recipe.epochs:
        progress.say(f"{folder}: continuing at epoch {position.epoch + 1}, step {position.step}")
    if world.main:
        rewind_metrics(folder, position.epoch * steps + position.step)
        board = Board(folder, position.epoch * steps + position.step)
        history = History(folder)
    saved_at = time.monotonic()

    def save() -> None:
        if world.main:
            state = {name: part.state_dict() for name, part in stateful.items()}
            save_checkpoint(folder, position, state, running.keep)

    def save_and_stop(number: int) -> NoReturn:
        save()
        world.barrier()  # no process ends while another one saves
        progress.say(f"{folder}: saved at epoch {position.epoch + 1}, step {position.step}")
        raise stopped(number)

    with stop_signals() as stop:
        while position.epoch < recipe.epochs:
            epoch = position.epoch
            order = repeated(epoch_order(job.training.lengths, seed, epoch, job.window), recipe.repeats)
            transform = training_geometry(recipe, job.image_size, device)
            on_bad: OnBad = "replace" if running.on_bad_sample == "skip" else "stop"
            batches = Batches(job.training, transform, positions, order, seed, epoch, on_bad)
            bad = BadSamples()
            loss_sum = torch.tensor(position.loss_sum, dtype=torch.float64, device=device)
            recent: list[Taken] = []
            network.train()
            set_training(model)
            clock.start()
            job.reached(epoch, position.step * batch_size)
            for step, batch in enumerate(  # no name keeps the batches, or their workers would outlive an error
                clock.steps_of(bad.noting(iterate(batches, position.step, loading))), position.step + 1
            ):
                torch.manual_seed(mix(seed, Purpose.STEP, epoch, step, world.rank))  # dropout
                images, labels = training_batch(batch, recipe, job.training.classes, device)
                lr = optimizer.param_groups[0]["lr"]
                loss = take_step(images, labels)
                recent.append(Taken(step, lr, loss, batch.keys))
                loss_sum += world.sum(loss.double()) / world.size
                job.reached(epoch, step * batch_size)
                stopping = world.max(stop.number)
                logging = step % LOG_EVERY == 0 or step == steps
                if not (logging or stopping):
                    continue

                position = replace(position, step=step, loss_sum=float(loss_sum))
                if not math.isfinite(position.loss_sum):
                    raise diverged(recent, epoch, world)
                if logging:
                    recent.clear()
                    mean_loss = (position.loss_sum - position.logged_sum) / ((step - 1) % LOG_EVERY + 1)
                    position = replace(position, logged_sum=position.loss_sum)
                    pace = clock.lap()
                    progress.print(epoch, step, mean_loss, lr, pace, clock.seconds_per_step())
                    if world.main:
                        line = {"split": "train", "epoch": epoch, "step": step, "global_step": epoch * steps + step}
                        line |= {"loss": mean_loss, "lr": lr}
                        line |= {"images_per_s": round(pace.images_per_s, 1), "waiting": round(pace.waiting, 4)}
                        append_metrics(folder, line)
                        board.add(line)
                if stopping:
                    save_and_stop(stopping)
                if step < steps and time.monotonic() - saved_at >= 60 * running.save_every_minutes:
                    save()
                    saved_at = time.monotonic()
            clock.pause()

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
                with closing(BadSamples().noting(stop.until_requested(iterate(batches, 0, loading)))) as shown:
                    scores = evaluate(model, shown, recipe, dtype, world)
                if stopping := world.max(stop.number):
                    save_and_stop(stopping)
                if not scores.samples:
                    raise FractalError("none of the held-out samples can be read; is the dataset still there?")
                summary |= asdict(scores)
                progress.say(
                    f"epoch {epoch + 1}/{recipe.epochs}  held out: top-1 {scores.top1:.2%}  top-5 {scores.top5:.2%}  "
                    f"loss {scores.loss:.4f}  {scores.samples:,} images"
                )
            position = Position(epoch + 1, history=(*position.history, summary))
            if world.main:
                line = {"split": "epoch", "epoch": epoch, "step": steps, "global_step": (epoch + 1) * steps, **summary}
                append_metrics(folder, line)
                board.add(line)
                board.flush()
            save()
            saved_at = time.monotonic()
            if world.main:
                history.redraw(last=position.epoch == recipe.epochs)

    result = final_result(position)
    if world.main:
        board.close()
        write_result(folder, result)
    progress.say(f"{folder}: {human_count(result['epochs'], 'epoch')} done, training loss {result['train_loss']:.4f}")
    if "top1" in result:
        progress.say(
            f"{folder}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} on {result['samples']:,} held-out "
            f"images (best top-1 {result['best_top1']:.2%} after epoch {result['best_epoch']})"
        )


class Taken(NamedTuple):
    """A step that was taken: this rank's own loss, still on the device, and the samples it is of."""

    step: int
    lr: float
    loss: torch.Tensor
    keys: tuple[str, ...]


def diverged(recent: Sequence[Taken], epoch: int, world: World) -> FractalError:
    """The error of a loss that is no number: the first step of ``recent`` that had it, and the samples of the ranks
    that saw it. Collective."""
    mine = [(taken.step, taken.lr, float(taken.loss), taken.keys) for taken in recent if not taken.loss.isfinite()]
    found = [first for first in world.gather(mine[0] if mine else None) if first]
    step, lr, loss, _ = min(found)
    keys = [key for number, _, _, some in found if number == step for key in some]
    return FractalError(
        f"the loss is {loss} at epoch {epoch + 1}, step {step}, learning rate {lr:.3g}, on the samples "
        f"{human_list(keys)}; lower --lr or limit the gradients (--set clip_grad=1), and start again in another folder "
        "(--out)"
    )


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


def environment(running: Running, world: World) -> dict[str, Any]:
    """What a run was computed with when it began, for the record."""
    return {
        "processes": world.size,
        "accumulate": running.accumulate,
        "compile": running.compile,
        "deterministic": running.deterministic,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
    }
