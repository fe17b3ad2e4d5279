"""Run the whole workflow in about ten minutes on two cores: render, pre-train, fine-tune, compare.

    python tools/demo.py     # or make demo

Every step is a command that is printed before it runs, so that you can copy and change it. Run the demo again to
continue it: the commands skip what is done.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from fractalshards.human import human_seconds

SHARDS = Path("shards/demo-single")
RUNS = Path("runs/demo")
SHEET = RUNS / "contact-sheet.png"
PRETRAINED, FINETUNED, SCRATCH = RUNS / "pretrained", RUNS / "finetuned", RUNS / "scratch"

# As in studies/fewshot.toml, with half its images: both learning rates of the fine-tuning were chosen on other subsets.
BUILD = (
    "fractalgen build --kind single --n 5000 --classes 50 --size 64 --set background=false --shard-size 500"
    f" --out {SHARDS}"
)
LOOK = f"fractalshards sheet {SHARDS} --classes 10 --out {SHEET}"
PRETRAIN = (
    f"fractaltrain pt --shards {SHARDS} --model resnet18 --image-size 32 --epochs 8 --lr 0.05 --nproc 2"
    f" --set crop=none --set mean=0.2 --set std=0.5 --set pct_start=0.2 --out {PRETRAINED}"
)
FINETUNE = (
    "fractaltrain ft --weights {weights} --data digits --per-class 5 --image-size 32 --epochs 8 --batch-size 10"
    " --set hflip=0 --lr {lr} --out {out}"
)


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
def main() -> None:
    """Run all steps and compare."""
    start = time.monotonic()
    for title, command in (
        ("Render 5,000 images of 50 fractals", BUILD),
        ("Draw a contact sheet", LOOK),
        ("Pre-train on them, in two processes", PRETRAIN),
        ("Fine-tune on 5 handwritten digits per class", FINETUNE.format(weights=PRETRAINED, lr=0.005, out=FINETUNED)),
        (
            "The same without pre-training",
            FINETUNE.format(weights="none --model resnet18", lr=0.05, out=SCRATCH),
        ),
    ):
        _run(title, command)
    _report(time.monotonic() - start)


def _run(title: str, command: str) -> None:
    click.secho(f"\n{title}", bold=True)
    click.echo(f"$ {command}")
    program, *arguments = shlex.split(command)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # two processes with gloo, on any machine
    code = subprocess.run([Path(sys.executable).with_name(program), *arguments], env=environment).returncode
    if code:
        sys.exit(code)


def _report(seconds: float) -> None:
    pretrained, scratch = (json.loads((run / "result.json").read_text()) for run in (FINETUNED, SCRATCH))
    click.secho(f"\nDone in {human_seconds(seconds)}.", bold=True)
    click.echo(f"top-1 on {pretrained['samples']:,} digits of the val split, after training on 5 per class:")
    click.echo(f"  pre-trained on fractals  {pretrained['top1']:6.1%}")
    click.echo(f"  from scratch             {scratch['top1']:6.1%}")
    click.echo("written:")
    for path, what in (
        (SHARDS, "the dataset: shards, sidecars, manifest"),
        (SHEET, "a contact sheet of it"),
        (PRETRAINED, "checkpoint, metrics and settings of the pre-training"),
        (FINETUNED, "the fine-tuning; result.json has its accuracy"),
        (SCRATCH, "the same from scratch"),
    ):
        click.echo(f"  {path!s:<28}{what}")
    click.echo("next, at full size (after source .venv/bin/activate):")
    click.echo("  fractalgen build --kind single --n 1000000")
    click.echo("  fractaltrain pt --shards shards/single")


if __name__ == "__main__":
    main()
