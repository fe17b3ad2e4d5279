"""How the arithmetic is done: precision, memory layout, compilation, determinism. None of it changes what is learnt."""

import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_count, human_list
from fractalshards.workers import available_cores
from fractaltrain.checkpoint import Position, checkpoint_path, load_checkpoint, restore, save_checkpoint
from fractaltrain.config import Amp, Running
from fractaltrain.data.source import Source
from fractaltrain.distributed import World
from fractaltrain.evaluate import LEADING, evaluate, evaluation_batch
from fractaltrain.log import Report
from fractaltrain.models import set_training
from fractaltrain.optim import Loss, build_optimizer, build_schedule, find_loss
from fractaltrain.preemption import stop_signals, stopped
from fractaltrain.recipes.recipe import check_batch
from fractaltrain.run_folder import open_run, write_result
from fractaltrain.stream.bits import Purpose, mix
from fractaltrain.stream.loader import BadSamples, Batches, Loading, OnBad, iterate
from fractaltrain.stream.order import (
    Indices,
    epoch_order,
    epoch_samples,
    evaluation_positions,
    repeated,
    steps_per_epoch,
    training_positions,
)
from fractaltrain.transforms import evaluation_geometry, training_batch, training_geometry


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


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last for convolutional networks on GPUs, whose tensor cores read it; contiguous otherwise.

    A network is convolutional if it has more than one convolution: a ViT's only one cuts the image into patches.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return torch.channels_last if device.type == "cuda" and convolutions > 1 else torch.contiguous_format


def set_determinism(deterministic: bool) -> None:
    """Let the same run give the same bits on the same hardware, or let cuDNN try out which algorithms are fastest."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first matrix product on a GPU
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms whose statistics are those of all processes together; names and parameters stay.

    Raises:
        UsageError: on a CPU, where torch has none.
    """
    if device.type != "cuda":
        raise UsageError("--sync-batchnorm needs GPUs; drop it")
    synchronised_model: nn.Module = convert_sync_batchnorm(model)  # timm's own batch norms, too
    return synchronised_model


def with_gradients_laid_out(model: nn.Module) -> nn.Module:
    """The model, of which gradients have the strides of their parameters, as DDP wants them.

    Where a dimension has a single entry its stride means nothing, and autograd leaves whatever it found: the gradient
    of a class token is a piece of that of all tokens if there is a single image. DDP compares all strides, and warns.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_laid_out_as, parameter.stride()))  # type: ignore[no-untyped-call]
    return model


def _laid_out_as(wanted: Sequence[int], gradient: torch.Tensor) -> torch.Tensor:
    dimensions = zip(gradient.shape, gradient.stride(), wanted, strict=True)
    same = all(size == 1 or stride == other for size, stride, other in dimensions)
    return gradient.as_strided(gradient.shape, wanted) if same else gradient  # autograd itself mends the others


def compiled(network: nn.Module) -> nn.Module:
    """The same network through torch.compile, which works when it is called first.

    Raises:
        FractalError: if this machine has no C++ compiler, which torch needs then.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise FractalError("--compile needs a C++ compiler; install g++, load a module that has it, or drop --compile")
    network_like: nn.Module = torch.compile(network)  # type: ignore[assignment]  # it behaves like one
    return network_like


@dataclass(frozen=True)
class Step:
    """What a step works with.

    Attributes:
        network: what is called: the model, perhaps wrapped and compiled.
        wrapped: the model as DDP wraps it, where there are several processes.
        loss: of logits (b, classes) and labels.
        dtype: of autocast; float32 means none.
        layout: memory format of the model, and so of its images.
        accumulate: parts of a rank's batch that are computed one after the other, their gradients added up.
        clip_grad: largest norm of all gradients together; None: no limit.
    """

    network: nn.Module
    wrapped: DistributedDataParallel | None
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    layout: torch.memory_format
    accumulate: int
    clip_grad: float | None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take the step; return the mean loss of this rank's batch, a float32 scalar on its device.

        Args:
            images: (b, 3, S, S) float32 on the model's device.
            labels: what the loss takes, there too: (b,) int64 or shares of classes (b, classes) float32.
        """
        images = images.contiguous(memory_format=self.layout)
        parts = list(zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True))
        losses = []
        self.optimizer.zero_grad()
        for number, (some_images, some_labels) in enumerate(parts, start=1):
            with self._gradients_kept_here(number < len(parts)):
                with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    loss = self.loss(self.network(some_images), some_labels) / len(parts)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's backward has no types
            losses.append(loss.detach())
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return torch.stack(losses).sum()

    def _gradients_kept_here(self, keep: bool) -> AbstractContextManager[None]:
        """Only with the last part the ranks add up their gradients."""
        return self.wrapped.no_sync() if keep and self.wrapped else nullcontext()


@dataclass(frozen=True)
class Learner:
    """A model in training.

    Attributes:
        model: neither wrapped nor compiled.
        averaged: exponential moving average of its weights, where the recipe asks for one.
        take_step: the optimiser step.
        parts: all that has a state, by the name it has in checkpoints.
    """

    model: nn.Module
    averaged: ModelEmaV3 | None
    take_step: Step
    parts: Mapping[str, Any]

    @property
    def lr(self) -> float:
        """Learning rate of the next step; that of the backbone where it learns and the classifier has its own."""
        rate: float = self.take_step.optimizer.param_groups[0]["lr"]
        return rate

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the averaged one, where there is one."""
        return self.averaged.module if self.averaged else self.model

    def state(self) -> dict[str, Any]:
        """State dicts by name, for a checkpoint."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def learn(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take a step and follow it with the average; see ``Step``."""
        loss = self.take_step(images, labels)
        if self.averaged:
            self.averaged.update(self.model, step=self.take_step.schedule.last_epoch)  # which counts steps
        return loss


def build_learner(model: nn.Module, running: Running, multi_label: bool, epoch_steps: int, world: World) -> Learner:
    """Place a model on this process's device and give it all that learning takes.

    Args:
        model: with its starting weights, the same on every rank.
        multi_label: images show several classes each.
        epoch_steps: optimiser steps in an epoch.

    Raises:
        UsageError: if precision or batch norm do not fit the device.
        FractalError: if it cannot be compiled.
    """
    recipe, device = running.recipe, world.device
    dtype = autocast_dtype(running.amp, device)
    set_determinism(running.deterministic)
    if running.sync_batchnorm:
        model = synchronised(model, device)
    layout = memory_format(model, device)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]  # as its documentation has it
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe, epoch_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    averaged = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    if averaged:
        parts["ema"] = averaged.module
    wrapped = DistributedDataParallel(with_gradients_laid_out(model)) if world.size > 1 else None
    network = model if wrapped is None else wrapped
    take_step = Step(
        network=compiled(network) if running.compile else network,
        wrapped=wrapped,
        loss=find_loss(multi_label),
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        dtype=dtype,
        layout=layout,
        accumulate=running.accumulate,
        clip_grad=recipe.clip_grad,
    )
    return Learner(model, averaged, take_step, parts)


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
