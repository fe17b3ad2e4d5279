"""``fractaltrain eval``: what a trained run says of held-out images, over all and by class."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.nn import functional

from fractalshards.console import old_progress as progress
from fractalshards.console import unseen
from fractalshards.errors import FractalError
from fractalshards.human import one_line
from fractalshards.storage import write_json
from fractaltrain.checkpoint import Trained, load_trained
from fractaltrain.config import Evaluation
from fractaltrain.data.images import Data, DataChoice, open_data
from fractaltrain.distributed import World, join_world
from fractaltrain.evaluate import PICTURE as PICTURE
from fractaltrain.evaluate import ClassPrecision, ClassScore, MultiLabelTally, Tally, draw_confusion, predict
from fractaltrain.optim import multi_label_loss
from fractaltrain.stream.loader import Batches, Loading, iterate
from fractaltrain.stream.order import Indices, evaluation_positions
from fractaltrain.train import loader_workers
from fractaltrain.transforms import evaluation_geometry

REPORT = "eval.json"
Prediction = tuple[torch.Tensor, torch.Tensor]
Score = ClassScore | ClassPrecision

_ALL_SHOWN = 99  # with more classes, only the ends of the list are printed
_END = 10


def evaluate_run(choice: Evaluation) -> None:
    """Evaluate the held-out images; print the scores, write ``eval.json`` and ``confusion.png``.

    Geometry, normalisation and precision are those of the run. Of a run that was fine-tuned on some images of every
    class of the same data, the same choice is made again, so that nothing it has learnt from is held out. Where images
    show several classes each, none is taken for another: there is no confusion matrix.

    Raises:
        FractalError: if run or images are missing or damaged, their classes differ, or the loss is no number.
    """
    with join_world() as world:
        run = load_trained(choice.run)
        chosen = replace(choice.data, per_class=run.per_class, subset_seed=run.subset_seed)
        data = open_data(chosen if run.data == choice.data.name else choice.data, world, for_training=False)
        check_classes(run, data, choice.data)
        with closing(predict_held_out(run, data, choice.batch_size, world)) as predictions:
            add = add_up_multi_label if data.multi_label else add_up
            tally = add(predictions, run, world)
        if not isfinite(tally.loss_sum):
            raise FractalError(
                f"{choice.run}: its loss on these images is {tally.loss_sum}, so its figures mean nothing; train it "
                "again with a lower --lr"
            )
        if world.main:
            names = data.class_names or run.class_names
            print(run.origin(), flush=True)
            folder = choice.out or choice.run / f"eval-{choice.data.identity}"
            folder.mkdir(parents=True, exist_ok=True)
            _write_report(folder, choice.data, run, tally, names)
            if isinstance(tally, Tally):
                title = f"{choice.run.resolve().name} on {choice.data.label}: top-1 {tally.top1:.1%}"
                draw_confusion(folder / PICTURE, tally.confusion(), tally.classes, names, title)
            _print(tally, names, folder)


def check_classes(run: Trained, data: Data, choice: DataChoice) -> None:
    """Whether the run's classifier speaks of the data's classes.

    Raises:
        FractalError: if it has another number of them, or other ones.
    """
    classes = data.held_out.classes
    advice = "evaluate on what it was trained on, or fine-tune first (fractaltrain ft)"
    if run.classes != classes:
        raise FractalError(
            f"{run.folder}: its classifier knows {run.classes:,} classes, but {choice.name} has {classes:,}; {advice}"
        )
    if run.class_names and data.class_names and run.class_names != data.class_names:
        label = next(label for label in range(classes) if run.class_names[label] != data.class_names[label])
        raise FractalError(
            f"{run.folder}: its class {label} is {run.class_names[label]}, but that of {choice.name} is "
            f"{data.class_names[label]}; {advice}"
        )


def predict_held_out(run: Trained, data: Data, batch_size: int, world: World) -> Generator[Prediction]:
    """What the run says of every held-out image, each rank of its share."""
    held_out = sum(data.held_out.lengths)
    share = evaluation_positions(held_out, batch_size, world.rank, world.size)
    batches = Batches(
        data.held_out,
        evaluation_geometry(run.recipe, run.image_size),
        share,
        np.arange(held_out),
        seed=0,
        epoch=0,
    )
    loading = Loading(loader_workers(None, world), pin_memory=world.device.type == "cuda")
    half_on_cpu = world.device.type == "cpu" and run.precision == torch.float16
    precision = torch.float32 if half_on_cpu else run.precision
    model = run.rebuilt().to(world.device)
    show = progress if world.main else unseen
    with show("evaluating", sum(map(len, share)), "images") as advance:
        for prediction in predict(model, iterate(batches, 0, loading), run.recipe, precision, world):
            yield prediction
            advance(len(prediction[0]))


def add_up(predictions: Iterable[Prediction], run: Trained, world: World) -> Tally:
    """Bring together what all ranks said of images of one class each. Collective."""
    labels, guesses, losses = [_none(1)], [_none(min(5, run.classes))], 0.0
    for logits, truth in predictions:
        labels.append(truth[:, None].cpu().numpy())
        guesses.append(logits.topk(min(5, run.classes)).indices.cpu().numpy())
        losses += float(functional.cross_entropy(logits, truth, reduction="sum"))
    parts = world.gather((np.concatenate(labels)[:, 0], np.concatenate(guesses), losses))
    return Tally(
        classes=run.classes,
        labels=np.concatenate([part[0] for part in parts]),
        guesses=np.concatenate([part[1] for part in parts]),
        loss_sum=sum(part[2] for part in parts),
    )


def add_up_multi_label(predictions: Iterable[Prediction], run: Trained, world: World) -> MultiLabelTally:
    """Bring together what all ranks said of images of several classes each. Collective."""
    said, shown, losses = [np.empty((0, run.classes), np.float32)], [np.empty((0, run.classes), np.bool_)], 0.0
    for logits, truth in predictions:
        said.append(logits.cpu().numpy())
        shown.append(truth.cpu().numpy() > 0)
        losses += float(multi_label_loss(logits, truth)) * len(logits)
    parts = world.gather((np.concatenate(said), np.concatenate(shown), losses))
    return MultiLabelTally(
        logits=np.concatenate([part[0] for part in parts]),
        shown=np.concatenate([part[1] for part in parts]),
        loss_sum=sum(part[2] for part in parts),
    )


def _none(width: int) -> Indices:
    return np.empty((0, width), np.int64)


def _write_report(
    folder: Path, data: DataChoice, run: Trained, tally: Tally | MultiLabelTally, names: tuple[str, ...]
) -> None:
    report = {
        "data": data.name,
        "model": run.model,
        "epochs": run.position.epoch,
        "checkpoint_sha256": run.sha256,
        **tally.figures(),
        "classes": [_class_entry(score, names) for score in tally.by_class()],
        **({"confusion": tally.confusion().tolist()} if isinstance(tally, Tally) else {}),
    }
    write_json(folder / REPORT, report, indent=1)


def _class_entry(score: Score, names: tuple[str, ...]) -> dict[str, Any]:
    figures = score._asdict()
    label = figures.pop("label")
    return {"class": label, **({"name": names[label]} if names else {}), **figures}


def _print(tally: Tally | MultiLabelTally, names: tuple[str, ...], folder: Path) -> None:
    scores = tally.by_class()
    console = Console()
    if tally.classes <= _ALL_SHOWN:
        console.print(_table("every class", scores, names, tally.headings))
    else:
        ranked = sorted((score for score in scores if score[2] is not None), key=lambda score: score[2] or 0)
        console.print(_table("the worst ten", ranked[:_END], names, tally.headings))
        console.print(_table("the best ten", ranked[: -_END - 1 : -1], names, tally.headings))
        print(f"all {tally.classes:,} classes: {folder / REPORT}")
    print(tally)
    if isinstance(tally, Tally):
        print(f"{folder}: {REPORT}, {PICTURE}")
    else:
        print(f"{folder}: {REPORT}; no confusion matrix, for images show several classes each")


def _table(title: str, scores: Sequence[Score], names: tuple[str, ...], headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("class", *(["name"] if names else []), "images", *headings):
        table.add_column(heading, justify="left" if heading == "name" else "right")
    for score in scores:
        label, samples, *shares = score
        name = [Text(one_line(names[label]))] if names else []
        table.add_row(
            str(label), *name, f"{samples:,}", *("-" if share is None else f"{share:.1%}" for share in shares)
        )
    return table
