"""Run the whole workflow on two cores: render, pre-train, fine-tune, compare.

    python tools/demo.py     # or make demo

Every step is a command that is printed before it runs, so that you can copy and change it. Run the demo again to
continue it: the commands skip what is done.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from fractalshards.human import human_seconds

ROOT = Path(__file__).parents[1]
SHARDS, RUNS = Path("shards/demo-single"), Path("runs/demo")
SHEET = RUNS / "contact-sheet.png"
STEPS = {
    "Render 5,000 images of 50 fractals": (
        "fractalgen build --kind single --n 5000 --classes 50 --size 64 --set background=false --shard-size 500"
        f" --out {SHARDS}"
    ),
    "Draw a contact sheet": f"fractalshards sheet {SHARDS} --classes 10 --out {SHEET}",
    "Pre-train on them, fine-tune on 5 handwritten digits per class, and do the same without pre-training": (
        f"fractaltrain study {ROOT / 'studies' / 'demo.toml'} --jobs 2 --out {RUNS}"
    ),
}


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
def main() -> None:
    """Run all steps and show the comparison."""
    start = time.monotonic()
    for title, command in STEPS.items():
        click.secho(f"\n{title}", bold=True)
        click.echo(f"$ {command}")
        program, *arguments = shlex.split(command)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the same on any machine
        code = subprocess.run([Path(sys.executable).with_name(program), *arguments], env=environment).returncode
        if code:
            sys.exit(code)
    click.secho(f"\nDone in {human_seconds(time.monotonic() - start)}.", bold=True)
    click.echo("The table has top-1 on the other 1,747 digits for three choices of the five digits per class.")
    for path, what in (
        (RUNS / "figure.png", "the comparison"),
        (SHEET, "a contact sheet of the dataset"),
        (SHARDS, "the dataset: shards, sidecars, manifest"),
        (RUNS, "runs: checkpoints, metrics and settings"),
    ):
        click.echo(f"{path!s:<28}{what}")
    click.echo("\nnext, at full size (after source .venv/bin/activate):")
    click.echo("  fractalgen build --kind single --n 1000000")
    click.echo("  fractaltrain pt --shards shards/single")


if __name__ == "__main__":
    main()
