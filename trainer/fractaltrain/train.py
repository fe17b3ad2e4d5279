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

from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_list
from fractalshards.workers import available_cores
from fractaltrain.checkpoint import Position, checkpoint_path, load_checkpoint, restore, save_checkpoint
from fractaltrain.data.source import Source
from fractaltrain.evaluation import LEADING, evaluate, evaluation_batch
from fractaltrain.inputs import evaluation_geometry, training_batch, training_geometry
from fractaltrain.learner import Learner, build_learner
from fractaltrain.models import set_training
from fractaltrain.preemption import stop_signals, stopped
from fractaltrain.recipes.batch import check_batch
from fractaltrain.report import Report
from fractaltrain.run_folder import open_run, write_result
from fractaltrain.settings import Running
from fractaltrain.stream.bad import BadSamples
from fractaltrain.stream.bits import Purpose, mix
from fractaltrain.stream.loader import Batches, Loading, OnBad, iterate
from fractaltrain.stream.order import (
    Indices,
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
        held_out: evaluated after every ``running.eval_every`` epochs and the last, where there is one.
        image_size: side in pixels of what the model sees.
        settings: JSON-like; what tells this run from others, see ``run_folder.open_run``.
        multi_label: images show several classes each.
        nodes: machines that share out an epoch's shards among them; 1: they do not.
        reached: told the epoch and how many of its steps are done, before its first step and after every step; datasets
            that lie elsewhere are fetched ahead of it.
    """

    running: Running
    model: nn.Module
    training: Source
    window: int
    held_out: Source | None
    image_size: int
    settings: Mapping[str, Any]
    multi_label: bool = False
    nodes: int = 1
    reached: Callable[[int, int], None] = lambda epoch, step: None


def train(job: Job, world: World) -> None:
    """Train to the end, from the start or from where the run's folder left off.

    The result is the run's folder: checkpoints, metrics, ``history.png``, ``result.json`` at the end. Only rank 0 reads
    and writes it.

    Raises:
        FractalError: if batch, samples and processes do not fit, the folder holds another run, a sample is damaged,
            or the loss is no longer a number.
        StoppedError: if a signal asked for it; the checkpoint is written.
    """
    running, recipe = job.running, job.running.recipe
    folder = running.out
    samples = epoch_samples(sum(job.training.lengths), recipe.repeats)
    check_batch(recipe, world.size, running.accumulate, samples)
    steps = steps_per_epoch(samples, recipe.batch_size, running.pad)
    positions = training_positions(samples, recipe.batch_size, world.rank, world.size, running.pad, job.nodes)
    learner = build_learner(job.model, running, job.multi_label, steps, world)
    loading = Loading(loader_workers(running.workers, world), pin_memory=world.device.type == "cuda")
    settings = run_settings(job, learner)

    saved = None
    if world.main:
        open_run(folder, settings, environment(running, world), running.resume)
        saved = load_checkpoint(folder)
    saved = world.share(saved)
    position = Position()
    if saved:
        restore(saved, learner.parts)
        position = saved.position
    report = Report(folder, recipe.epochs, steps, recipe.batch_size, position, world.main)
    for problem in saved.passed_over if saved else ():
        report.say(f"{problem}; taking the one before")
    if saved and position.epoch < recipe.epochs:
        report.say(f"{folder}: continuing at epoch {position.epoch + 1}, step {position.step}")
    elif saved:
        report.say(f"{folder}: was finished already")
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved_at
        if world.main:
            save_checkpoint(folder, position, {**learner.state(), "settings": settings}, running.keep)
        saved_at = time.monotonic()

    def save_and_stop(number: int) -> NoReturn:
        save()
        world.barrier()  # no process ends while another one saves
        place = f"epoch {position.epoch + 1}, step {position.step}"
        report.say(f"{folder}: saved at {place}, as {checkpoint_path(folder, position).name}")
        raise stopped(number)

    with closing(report), stop_signals() as stop:
        while position.epoch < recipe.epochs:
            epoch = position.epoch
            batches = training_batches(job, positions, epoch, world)
            bad = BadSamples(position.bad_samples)
            loss_sum = torch.tensor(position.loss_sum, dtype=torch.float64, device=world.device)
            recent: list[Taken] = []
            set_training(learner.model)
            report.clock.start()
            job.reached(epoch, position.step)
            for step, batch in enumerate(  # no name keeps the batches, or their workers would outlive an error
                report.clock.steps_of(bad.noting(iterate(batches, position.step, loading))), position.step + 1
            ):
                torch.manual_seed(mix(running.seed, Purpose.STEP, epoch, step, world.rank))  # dropout
                lr = learner.lr
                loss = learner.learn(*training_batch(batch, recipe, job.training.classes, world.device))
                recent.append(Taken(step, lr, loss, batch.keys))
                loss_sum += world.sum(loss.double()) / world.size
                job.reached(epoch, step)
                stopping = world.max(stop.number)
                logging = step % LOG_EVERY == 0 or step == steps
                if not (logging or stopping):
                    continue

                position = replace(position, step=step, loss_sum=float(loss_sum))
                if running.on_bad_sample == "skip":
                    position = replace(position, bad_samples=bad.total(world))
                if not math.isfinite(position.loss_sum):
                    raise diverged(recent, epoch, world)
                if logging:
                    recent.clear()
                    mean_loss = (position.loss_sum - position.logged_sum) / ((step - 1) % LOG_EVERY + 1)
                    position = replace(position, logged_sum=position.loss_sum)
                    report.step(epoch, step, mean_loss, lr)
                if stopping:
                    save_and_stop(stopping)
                if step < steps and time.monotonic() - saved_at >= 60 * running.save_every_minutes:
                    save()
            report.clock.pause()

            summary = {"train_loss": position.loss_sum / steps}
            if replaced := position.bad_samples:
                summary["bad_samples"] = replaced
                many = human_count(replaced, "bad sample")
                report.say(f"epoch {epoch + 1}/{recipe.epochs}  {many} replaced by others")
            if job.held_out is not None and is_evaluated(epoch, running):
                shown = BadSamples().noting(
                    stop.until_requested(iterate(held_out_batches(job, job.held_out, epoch, world), 0, loading))
                )
                with closing(shown):
                    scores = evaluate(learner.evaluated, shown, recipe, learner.take_step.dtype, job.multi_label, world)
                if stopping := world.max(stop.number):
                    save_and_stop(stopping)
                if not scores.samples:
                    raise FractalError("none of the held-out samples can be read; is the dataset still there?")
                summary |= asdict(scores)
                report.say(f"epoch {epoch + 1}/{recipe.epochs}  held out: {scores}")
            position = Position(epoch + 1, history=(*position.history, summary))
            report.epoch(epoch, summary)
            save()
            report.draw(position.epoch)

    result = final_result(position)
    if world.main:
        write_result(folder, result)
        done = f"{human_count(result['epochs'], 'epoch')} done, training loss {result['train_loss']:.4f}"
        print(*(f"{folder}: {line}" for line in (done, describe_result(result)) if line), sep="\n", flush=True)


def is_evaluated(epoch: int, running: Running) -> bool:
    """Whether the held-out images are looked at after an epoch, counted from 0."""
    return (epoch + 1) % running.eval_every == 0 or epoch + 1 == running.recipe.epochs


def training_batches(job: Job, positions: Indices, epoch: int, world: World) -> Batches:
    """This rank's batches of an epoch, all of them."""
    running, recipe = job.running, job.running.recipe
    order = repeated(epoch_order(job.training.lengths, running.seed, epoch, job.window), recipe.repeats)
    geometry = training_geometry(recipe, job.image_size, world.device)
    on_bad: OnBad = "replace" if running.on_bad_sample == "skip" else "stop"
    return Batches(job.training, geometry, positions, order, running.seed, epoch, on_bad)


def held_out_batches(job: Job, held_out: Source, epoch: int, world: World) -> Batches:
    """This rank's share of the held-out samples; ranks may have a batch more or less."""
    running, recipe = job.running, job.running.recipe
    count = sum(held_out.lengths)
    positions = evaluation_positions(count, evaluation_batch(recipe, world), world.rank, world.size)
    geometry = evaluation_geometry(recipe, job.image_size)
    on_bad: OnBad = "drop" if running.on_bad_sample == "skip" else "stop"
    return Batches(held_out, geometry, positions, np.arange(count), running.seed, epoch, on_bad)


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
    """``result.json``: the last epoch's figures, the best of the leading one among the epochs that were evaluated, and
    which that was, counted from 1; shares in [0, 1]."""
    last = position.history[-1]
    result: dict[str, Any] = {"epochs": position.epoch, **last}
    leading = next((name for name in LEADING if name in last), None)
    if leading:
        evaluated = (epoch for epoch in range(position.epoch) if leading in position.history[epoch])
        best = max(evaluated, key=lambda epoch: position.history[epoch][leading])
        result |= {f"best_{leading}": position.history[best][leading], "best_epoch": best + 1}
    return result


def describe_result(result: Mapping[str, Any]) -> str:
    """The accuracy on held-out images in words; empty where there are none."""
    if "top1" in result:
        figures = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}"
        best = f"best top-1 {result['best_top1']:.2%}"
    elif "map" in result:
        figures = f"mean average precision {result['map']:.2%}, F1 {result['f1']:.2%}"
        best = f"best {result['best_map']:.2%}"
    else:
        return ""
    return f"{figures} on {result['samples']:,} held-out images ({best} after epoch {result['best_epoch']})"


def run_settings(job: Job, learner: Learner) -> dict[str, Any]:
    """All that decides what a run computes, JSON-like."""
    running = job.running
    return {
        **job.settings,
        "recipe": asdict(running.recipe),
        "image_size": job.image_size,
        "window": job.window,
        "seed": running.seed,
        "pad": running.pad,
        "precision": str(learner.take_step.dtype),
        **({"sync_batchnorm": True} if running.sync_batchnorm else {}),
    }


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
