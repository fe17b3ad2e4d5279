"""The command ``fractalshards``: parses options, calls one function per command, prints the result."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click

from fractalshards.console import (
    PATH,
    PICTURE,
    Commands,
    NamedPath,
    continuable,
    next_step,
    note,
    progress,
    quiet_option,
    workers_option,
    write_recipe,
)
from fractalshards.diff import compare_datasets
from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_bytes, human_count, one_line
from fractalshards.manifest import MAX_SHARD_SIZE, load_manifest
from fractalshards.pack import leave_out_bad, parse_source, plan_pack, run_pack
from fractalshards.recipe_file import export_recipe, flat_recipe
from fractalshards.report import load_template, render_page
from fractalshards.sheet import contact_sheet, sample_rows, save_picture
from fractalshards.storage import check_writable, write_bytes
from fractalshards.survey import survey_dataset
from fractalshards.verify import repair_advice, verify_dataset

_FOLDER = click.argument("folder", metavar="DIR", type=PATH)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=Commands)
@click.version_option(package_name="fractalpretrain", prog_name="fractalshards")
def main() -> None:
    """Inspect, verify, share and compare datasets of shards, and pack real images into shards."""


@main.command()
@_FOLDER
@_JSON
def info(folder: Path, as_json: bool) -> None:
    """Show a summary of a dataset.

    Example: fractalshards info shards/single
    """
    manifest = load_manifest(folder)
    splits = manifest.splits.items()
    facts: dict[str, object] = {
        "folder": str(folder),
        "splits": {name: {"samples": manifest.samples(name), "shards": len(shards)} for name, shards in splits},
        "bytes": manifest.bytes(),
        "image_size": manifest.image_size,
        "classes": manifest.classes,
        "label_type": manifest.label_type,
        "content_digest": manifest.content_digest(),
        "recipe_digest": manifest.recipe_digest,
        "recipe": manifest.recipe,
        "software": manifest.software,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    facts |= {
        "splits": {name: f"{manifest.samples(name):,} images in {human_count(len(s), 'shard')}" for name, s in splits},
        "bytes": human_bytes(manifest.bytes()),
        "recipe": flat_recipe(manifest.recipe),
    }
    for name, fact in facts.items():
        rows = fact if isinstance(fact, Mapping) else {"": fact}
        for inner, value in rows.items():
            title = f"{name}: {inner}" if inner else name
            click.echo(f"{one_line(title):26}{one_line(str(value))}")


@main.command()
@_FOLDER
@workers_option
@_JSON
@quiet_option
def verify(folder: Path, workers: int, as_json: bool) -> None:
    """Check hashes and counts and decode every image; list all problems and exit with 1 if there are any.

    Example: fractalshards verify shards/single
    """
    manifest = load_manifest(folder)
    with progress("verifying", "images") as on_progress:
        problems = verify_dataset(manifest, workers, on_progress)
    if as_json:
        click.echo(json.dumps({"sound": not problems, "problems": [asdict(problem) for problem in problems]}, indent=1))
    else:
        for problem in problems:
            click.echo(one_line(f"bad: {folder}/{problem}"))
    if problems:
        raise FractalError(f"{folder}: {human_count(len(problems), 'problem')}; {repair_advice(manifest)}")
    if not as_json:
        click.echo(f"sound: {manifest.summary()}")


@main.command()
@_FOLDER
@click.option("--out", type=PICTURE, required=True, help="Image file to write: .png or .jpg.")
@click.option("--split", default="train", metavar="train|val", help="Split to show.")
@click.option("--classes", default=16, type=click.IntRange(1), help="Number of rows.")
@click.option("--per-class", default=8, type=click.IntRange(1), help="Images per row.")
@click.option("--tile", default=96, type=click.IntRange(8), help="Size of each image in pixels.")
def sheet(folder: Path, out: Path, split: str, classes: int, per_class: int, tile: int) -> None:
    """Draw a contact sheet of a dataset, one row per class.

    Example: fractalshards sheet shards/single --out single.png
    """
    manifest = load_manifest(folder)
    rows = sample_rows(manifest, split, classes, per_class, tile)
    image = contact_sheet(rows, tile)
    save_picture(image, out)
    click.echo(f"{out}: {image.width} x {image.height} pixels, {len(rows):,} of {manifest.classes:,} classes")


@main.command()
@_FOLDER
@click.option("--out", type=NamedPath(".html", ".htm"), required=True, help="HTML file to write.")
@workers_option
@quiet_option
def report(folder: Path, out: Path, workers: int) -> None:
    """Write an HTML page about a dataset: samples of every class, distributions, recipe, digests.

    The page is one self-contained file of at most 12 MB. It needs pip install '.[report]'.

    Example: fractalshards report shards/single --out single.html
    """
    check_writable(out.parent)
    template = load_template()
    with progress("surveying", "images") as on_progress:
        survey = survey_dataset(load_manifest(folder), workers, on_progress)
    page = render_page(template, survey).encode()
    write_bytes(out, page)
    click.echo(f"{out}: {human_bytes(len(page))}")


@main.command()
@_FOLDER
@click.option("--out", type=PATH, help="File to write.  [default: standard output]")
def recipe(folder: Path, out: Path | None) -> None:
    """Write the portable recipe of a dataset, a small file from which 'fractalgen build' renders the same images.

    Example: fractalshards recipe shards/single > recipe.json
    """
    write_recipe(export_recipe(load_manifest(folder)), out, "fractalgen build --recipe")


@main.command()
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@workers_option
@_JSON
@quiet_option
def diff(first: Path, second: Path, workers: int, as_json: bool) -> int:
    """Compare two datasets; exit with 0 if their samples are equal, otherwise with 1.

    Content digests come from the manifests; images are read only to name the samples that differ.

    Example: fractalshards diff shards/single /mnt/copy/single
    """
    with progress("comparing", "samples") as on_progress:
        found = compare_datasets(load_manifest(first), load_manifest(second), workers, on_progress)
    if as_json:
        click.echo(json.dumps({"same": found.same, "findings": list(found.findings)}, indent=1))
    else:
        for line in found.findings:
            click.echo(one_line(line))
        verdict = "same samples" if found.same else "the samples differ"
        click.echo(f"{verdict}, according to the manifests; 'fractalshards verify DIR' checks the files")
    return 0 if found.same else 1


def _parse_ranges(context: click.Context, parameter: click.Parameter, text: str | None) -> list[range] | None:
    """Parse ``0-9,12`` as ranges of shard numbers."""
    if text is None:
        return None
    ranges = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not re.fullmatch(r"\d{1,9}(-\d{1,9})?", part.strip()) or int(last or first) < int(first):
            raise UsageError(f"--shards {text}: expected numbers and ranges of shards such as 0-9,12")
        ranges.append(range(int(first), int(last or first) + 1))
    return ranges


_JOBS = click.option("--jobs", default=8, type=click.IntRange(1), help="Files transferred at a time.")
_SHARDS = click.option(
    "--shards", metavar="0-9,12", callback=_parse_ranges, help="Only these shards of each split.  [default: all]"
)


@main.command()
@_FOLDER
@click.argument("url", metavar="URL")
@_SHARDS
@_JOBS
@quiet_option
def push(folder: Path, url: str, shards: list[range] | None, jobs: int) -> None:
    """Copy a dataset to another folder, S3, Google Cloud Storage or Hugging Face.

    URL is a path, s3://BUCKET/PATH, gs://BUCKET/PATH or hf://datasets/USER/NAME. Only missing or
    different files are transferred, and every one is checked.

    Example: fractalshards push shards/single s3://bucket/single
    """
    from fractalshards.remote import transfer  # fsspec and others take a while to import

    with continuable(folder), progress("pushing", "B") as on_progress:
        result = transfer.push(folder, url, shards, jobs, on_progress)
    click.echo(result.summary())


@main.command()
@click.argument("url", metavar="URL")
@_FOLDER
@_SHARDS
@_JOBS
@quiet_option
def pull(url: str, folder: Path, shards: list[range] | None, jobs: int) -> None:
    """Copy a dataset from another folder, a web server, S3, Google Cloud Storage or Hugging Face.

    URL is a path, https://HOST/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH or hf://datasets/USER/NAME. Only
    missing or different files are transferred, and every one is checked.

    Example: fractalshards pull s3://bucket/single shards/single
    """
    from fractalshards.remote import transfer

    with continuable(folder), progress("pulling", "B") as on_progress:
        result = transfer.pull(url, folder, shards, jobs, on_progress)
    click.echo(result.summary())


@main.command()
@click.argument("source", metavar="imagefolder:PATH|imagenet:PATH")
@click.argument("out", metavar="OUT", type=PATH)
@click.option("--split", metavar="train=X,val=Y", help="Shares (0.9), or folders below PATH.")
@click.option("--shard-size", default=1000, type=click.IntRange(1, MAX_SHARD_SIZE), help="Images per shard.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Seed of the order and of the val images.")
@click.option("--on-bad-image", type=click.Choice(["stop", "skip"]), default="stop",
              help="Unreadable images: stop, or skip them after checking all images first.",
              )  # fmt: skip
@workers_option
@quiet_option
def pack(
    source: str, out: Path, split: str | None, shard_size: int, seed: int, on_bad_image: str, workers: int
) -> None:
    """Pack existing images into shards. JPEG, PNG and WebP files are stored as they are.

    Run the same command again to continue: finished shards are skipped.

    imagefolder:PATH contains train/CLASS/* and val/CLASS/*, or only CLASS/*, all of which goes to train.
    '--split train=0.9,val=0.1' holds out a tenth of each class for val; '--split train=DIR,val=DIR' names the folders
    of the splits.

    imagenet:PATH contains ILSVRC2012_img_train.tar, ILSVRC2012_devkit_t12.tar.gz and, unless val is a share of train
    or not needed, ILSVRC2012_img_val.tar. They are read in place; this needs pip install '.[imagenet]'.

    Example: fractalshards pack imagenet:/data/archives shards/imagenet
    """
    images = parse_source(source, split)
    note(f"note: listing the images of {images.path}")
    listing = images.list_images(out)
    if on_bad_image == "skip":
        with progress("checking", "images") as on_progress:
            listing = leave_out_bad(listing, workers, on_progress)
    plan = plan_pack(out, images, listing, seed, shard_size)
    for text in listing.notes:
        note(f"note: {text}")
    count = sum(task.stop - task.first for task in plan.missing)
    finished = len(plan.shards) - len(plan.missing)
    done = f", {finished:,} of them done" if finished else ""
    note(
        f"{out}: {plan.info.classes:,} classes in {human_count(len(plan.shards), 'shard')}{done}; "
        f"to pack: {human_count(count, 'image')}"
    )
    with continuable(out), progress("packing", "images") as on_progress:
        run_pack(plan, workers, on_progress)
    click.echo(one_line(load_manifest(out).summary()))
    next_step("fractaltrain pt --shards", out)
