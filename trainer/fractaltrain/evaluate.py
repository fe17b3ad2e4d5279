"""Evaluation, during training and for ``eval``: predict, gather the predictions of all ranks, compute metrics."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fractalshards.errors import FractalError
from fractalshards.storage import check_writable, remove_leftovers, write_json
from fractalshards.workers import OnProgress, no_progress
from fractaltrain.checkpoint import TrainedRun, load_run
from fractaltrain.config import EvalConfig, ImagesConfig, TrainConfig
from fractaltrain.data.images import open_data
from fractaltrain.data.source import LabelledSource, SampleSource
from fractaltrain.distributed import StopFlag, World, join_world
from fractaltrain.models import choose_attention
from fractaltrain.optim import multi_label_loss
from fractaltrain.plotting import draw_confusion
from fractaltrain.recipes.recipe import TrainRecipe
from fractaltrain.stream.loader import epoch_loader
from fractaltrain.stream.order import evaluation_positions
from fractaltrain.transforms import normalize, val_transform

REPORT, PICTURE = "eval.json", "confusion.png"

_MAX_CELLS = 1000  # side of the confusion matrix; with more classes, neighbours share a cell
_TOP = 5
_LEAST_BATCH = 256  # images per rank when evaluating during training: smaller batches would only be slower


@dataclass(frozen=True)
class Predictions:
    """Predictions for images with known labels."""

    classes: int
    labels: npt.NDArray[Any]  # (n,) int64; if images show several classes each: (n, classes) bool
    predicted: npt.NDArray[Any]  # most likely classes, best first, (n, min(5, classes)) int64; or logits (n, classes)
    loss: float  # mean over the images, in nats

    @property
    def multi_label(self) -> bool:
        """Whether images show several classes each."""
        return self.labels.ndim == 2

    def scores(self) -> dict[str, float]:
        """Return ``samples``, ``loss`` and ``top1``, ``top5`` or ``map``, ``f1``, in [0, 1].

        ``map`` is the mean average precision of the classes that some image shows. ``f1`` is over all pairs of image
        and class, where a class is predicted if its probability is at least one half. The loss weights the classes
        shown by ``classes / number shown``, which adds its logarithm to the logits; it is subtracted first.
        """
        if not self.multi_label:
            hits = self.predicted == self.labels[:, None]
            accuracies = {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean())}
            return {"samples": len(self.labels), "loss": self.loss, **accuracies}
        from sklearn.metrics import f1_score  # takes a second to import

        shown = self.labels.any()
        threshold = np.log(self.labels.size / self.labels.sum()) if shown else 0.0
        f1 = f1_score(self.labels, self.predicted >= threshold, average="micro", zero_division=0) if shown else 0.0
        mean = float(np.nanmean(self.average_precisions())) if shown else 0.0
        return {"samples": len(self.labels), "loss": self.loss, "map": mean, "f1": float(f1)}

    def average_precisions(self) -> npt.NDArray[np.float64]:
        """Return the average precision of every class, (classes,); NaN for those that no image shows."""
        from sklearn.metrics import average_precision_score

        shown = self.labels.any(0)
        precisions = np.full(self.classes, np.nan)
        if shown.any():
            precisions[shown] = average_precision_score(self.labels[:, shown], self.predicted[:, shown], average=None)
        return precisions

    def class_scores(self) -> list[dict[str, Any]]:
        """Return the scores of every class by index, ``samples`` first; None for classes without images."""
        if self.multi_label:
            counts, columns = self.labels.sum(0), {"average_precision": self.average_precisions()}
        else:
            hits = self.predicted == self.labels[:, None]
            counts = np.bincount(self.labels, minlength=self.classes)
            sums = {"top1": hits[:, 0], "top5": hits.any(1)}
            with np.errstate(invalid="ignore"):
                columns = {name: np.bincount(self.labels, hit, self.classes) / counts for name, hit in sums.items()}
        return [
            {"samples": int(count)}
            | {name: float(column[label]) if count else None for name, column in columns.items()}
            for label, count in enumerate(counts)
        ]

    def confusion(self) -> npt.NDArray[np.int64]:
        """Return (k, k) counts of images of class i that are predicted to be class j; k is at most 1000."""
        from sklearn.metrics import confusion_matrix

        cells = min(self.classes, _MAX_CELLS)
        true, predicted = (column * cells // self.classes for column in (self.labels, self.predicted[:, 0]))
        matrix: npt.NDArray[np.int64] = confusion_matrix(true, predicted, labels=np.arange(cells))
        return matrix


def describe_scores(scores: Mapping[str, float]) -> str:
    """Format scores for people, e.g. ``top-1 81.25%  top-5 98.10%  loss 0.7512  10,000 val images``."""
    names = {"top1": "top-1", "top5": "top-5", "map": "mAP", "f1": "F1"}
    shares = [f"{text} {scores[name]:.2%}" for name, text in names.items() if name in scores]
    return "  ".join([*shares, f"loss {scores['loss']:.4f}", f"{scores['samples']:,} val images"])


def predict(
    model: nn.Module,
    source: SampleSource,
    recipe: TrainRecipe,
    image_size: int,
    dtype: torch.dtype,
    batch_size: int,
    world: World,
    workers: int | None = None,
    skip_bad: bool = False,
    stop: StopFlag | None = None,
    on_progress: OnProgress = no_progress,
) -> Predictions | None:
    """Predict all samples of a source, each on one rank, and gather the predictions on rank 0. Collective.

    Ranks may have different numbers of batches, so ``model`` must not be wrapped by DDP. Its buffers (batch norm
    statistics) are set to those of rank 0, as in checkpoints. It is left in evaluation mode. Raises FractalError if a
    sample cannot be read; with ``skip_bad``, if none can. Returns None if a signal came before the first batch.

    Args:
        dtype: precision of autocast; float32: no autocast.
        batch_size: images at a time, of all ranks together.
        workers: loader processes of each rank; None: chosen from the number of cores.
        skip_bad: leave out samples that cannot be read.
        stop: end early when it has a signal.
        on_progress: called on rank 0 with its images (done, total).
    """
    for buffer in model.buffers():
        world.broadcast(buffer)
    model.eval()
    count = sum(source.lengths)
    positions = evaluation_positions(count, batch_size, world.rank, world.size)
    total = sum(map(len, positions))
    labels: list[npt.NDArray[Any]] = []
    predicted: list[torch.Tensor] = []
    loss = torch.zeros((), dtype=torch.float64, device=world.device)  # a copy to the host would wait for the GPU
    loader = epoch_loader(
        source,
        val_transform(recipe, image_size),
        positions,
        np.arange(count),
        seed=0,
        epoch=0,
        workers=world.loader_workers(workers),
        pin_memory=world.device.type == "cuda",
        on_bad="drop" if skip_bad else "stop",
    )
    with closing(loader), torch.inference_mode():
        for batch in loader:
            if stop and stop.signal:
                break
            if not batch.keys:  # no sample could be read
                continue
            images = normalize(batch.images.to(world.device, non_blocking=True), recipe)
            truth = batch.labels.to(world.device, non_blocking=True)
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            logits = logits.float()
            if truth.ndim == 2:
                loss += multi_label_loss(logits, truth).double() * len(logits)
                labels.append((batch.labels > 0).numpy())
                predicted.append(logits.cpu())  # they may be too large for the memory of a GPU
            else:
                loss += functional.cross_entropy(logits, truth, reduction="sum").double()
                labels.append(batch.labels.numpy())
                predicted.append(logits.topk(min(_TOP, source.classes)).indices)
            if world.main:
                on_progress(sum(map(len, labels)), total)
    arrays = [tensor.cpu().numpy() for tensor in predicted]
    parts = world.gather((labels, arrays, float(loss), bool(stop and stop.signal)))
    labels = [array for part in parts for array in part[0]]
    if not labels and not any(part[3] for part in parts):
        raise FractalError("none of the val samples can be read; is the dataset still there?")
    if not labels or not world.main:
        return None
    arrays = [array for part in parts for array in part[1]]
    mean_loss = sum(part[2] for part in parts) / sum(map(len, labels))
    return Predictions(source.classes, np.concatenate(labels), np.concatenate(arrays), mean_loss)


def evaluate(
    config: TrainConfig,
    model: nn.Module,
    val: SampleSource,
    image_size: int,
    dtype: torch.dtype,
    world: World,
    stop: StopFlag,
) -> dict[str, float]:
    """Evaluate the val split during training; return the scores on all ranks, empty if a signal came. Collective.

    Raises FractalError as ``predict`` does, or if the loss is not finite.
    """
    recipe, run = config.recipe, config.run
    batch_size, skip_bad = max(recipe.batch_size, _LEAST_BATCH * world.size), run.on_bad_sample == "skip"
    predictions = predict(model, val, recipe, image_size, dtype, batch_size, world, run.workers, skip_bad, stop)
    scores = world.share(predictions.scores() if predictions else {})
    if scores and not isfinite(scores["loss"]):
        raise FractalError(
            f"the loss on the val split is {scores['loss']}; lower --lr or limit the gradients (--set clip_grad=1), "
            "and start again in another folder (--out)"
        )
    return scores


class EvalReport(NamedTuple):
    """An evaluation."""

    folder: Path  # holds ``eval.json``, and with one class per image ``confusion.png``
    origin: str  # a line that says where the weights come from
    contents: Mapping[str, Any]  # contents of ``eval.json``


def evaluate_run(config: EvalConfig, on_progress: OnProgress = no_progress) -> EvalReport | None:
    """Evaluate a run on a val split; write the report on rank 0 and return it there, None on other ranks.

    Geometry, normalisation and precision are those of the run. If it was fine-tuned on a subset of the same data, the
    subset is drawn again, so that no training image is evaluated. Raises FractalError if run or images are missing or
    damaged, their classes differ, or the loss is not finite. ``on_progress`` is called with rank 0's (done, total).
    """
    with join_world() as world:
        run = load_run(config.run)
        settings = run.settings
        subset = replace(config.data, per_class=settings.per_class, subset_seed=settings.subset_seed or 0)
        data = open_data(subset if settings.data == config.data.shown else config.data, world, for_training=False)
        assert data.val is not None  # open_data gives both splits
        check_classes(run, data.val, config.data)
        folder = config.out or config.run / f"eval-{config.data.identity}"
        if world.main:
            check_writable(folder)
        dtype = torch.float32 if world.device.type == "cpu" and run.precision == torch.float16 else run.precision
        model = run.build_model().to(world.device)
        choose_attention(model, world.device, dtype)
        recipe, size = settings.recipe, settings.image_size
        predictions = predict(model, data.val, recipe, size, dtype, config.batch_size, world, on_progress=on_progress)
    if predictions is None:
        return None
    if not isfinite(predictions.loss):
        raise FractalError(f"{config.run}: its loss on these images is {predictions.loss}; train with a lower --lr")
    names = data.val.class_names or settings.class_names
    contents = {
        "data": config.data.shown,
        "model": settings.model,
        "epochs": run.checkpoint.position.epoch,
        "checkpoint_sha256": run.sha256,
        **predictions.scores(),
        "classes": [
            {"class": label, **({"name": names[label]} if names else {}), **scores}
            for label, scores in enumerate(predictions.class_scores())
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not predictions.multi_label:
        counts = predictions.confusion()
        contents["confusion"] = counts.tolist()
        title = f"{run.folder.resolve().name} on {config.data.label}: top-1 {contents['top1']:.1%}"
        draw_confusion(folder / PICTURE, counts, predictions.classes, names, title)
    write_json(folder / REPORT, contents, indent=1)
    return EvalReport(folder, run.origin, contents)


def check_classes(run: TrainedRun, val: LabelledSource, choice: ImagesConfig) -> None:
    """Raise FractalError if number or names of the classes differ from those that the run was trained on."""
    settings, advice = run.settings, "evaluate on the data it was trained on, or fine-tune first (fractaltrain ft)"
    if settings.classes != val.classes:
        problem = f"{settings.classes:,} classes, but {val.classes:,} in {choice.name}"
        raise FractalError(f"{run.folder}: {problem}; {advice}")
    if val.class_names and not settings.class_names and "systems_digest" in settings.dataset_recipe:  # were rendered
        raise FractalError(f"{run.folder}: its classes are rendered ones, not those of {choice.name}; {advice}")
    for label, (ours, theirs) in enumerate(zip(settings.class_names, val.class_names, strict=False)):
        if ours != theirs:
            raise FractalError(f"{run.folder}: class {label} is {ours}, but {theirs} in {choice.name}; {advice}")
