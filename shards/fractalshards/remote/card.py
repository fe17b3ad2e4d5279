"""The card of a dataset on Hugging Face: ``README.md``, with a contact sheet and the portable recipe beside it."""

import io
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from fractalshards.errors import FractalError
from fractalshards.human import human_list, one_line
from fractalshards.manifest import TRAINING, Manifest
from fractalshards.recipe_file import export_recipe, flat_recipe
from fractalshards.remote.stores import Location, Upload
from fractalshards.sheet import contact_sheet, sample_rows

README = "README.md"
PREVIEW = "preview.jpg"
PORTABLE = "portable.json"

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_ROWS, _TILE = 8, 96  # of the contact sheet
_PAPERS = {  # by the kinds and training recipes that follow them: number at arXiv, and title
    "fractaldb kataoka": ("2101.08515", "Kataoka et al., Pre-training without Natural Images, ACCV 2020"),
    "single multi anderson anderson-scratch": (
        "2110.03091",
        "Anderson and Farrell, Improving Fractal Pre-training, WACV 2022",
    ),
    "deit": ("2012.12877", "Touvron et al., Training data-efficient image transformers, ICML 2021"),
    "nakashima": ("2103.13023", "Nakashima et al., Can Vision Transformers Learn without Natural Images?, 2021"),
    "rcdb fdsl-imagenet": (
        "2206.09132",
        "Kataoka et al., Replacing Labeled Real-image Datasets with Auto-generated Contours, CVPR 2022",
    ),
    "visualatom": ("2303.01112", "Takashima et al., Visual Atoms, CVPR 2023"),
    "onepfrac fdsl": ("2408.00677", "Nakamura et al., Scaling Backwards, ECCV 2024"),
}


def citation(*names: object) -> str:
    """Return a section that cites the papers of kinds and training recipes; empty if there are none."""
    papers = [paper for followers, paper in _PAPERS.items() if {*followers.split()} & {*names}]
    lines = [f"- [{title}](https://arxiv.org/abs/{number})\n" for number, title in papers]
    return "\n## Citation\n\n" + "".join(lines) if lines else ""


def licence(recipe: Mapping[str, Any]) -> str:
    """Return the hub's id of the licence of images: that of this software for rendered ones, else ``unknown``."""
    return "mit" if "systems_digest" in recipe else "unknown"


def dataset_card(manifest: Manifest, location: Location) -> list[Upload]:
    """Make the card of a dataset in a local folder, for its place on the hub.

    Its metadata make ``load_dataset`` and the hub's viewer read the tars, and not the sidecars. A whole rendered
    dataset also gets its portable recipe, unless that is too large. Raises FractalError if a sidecar or an image is
    damaged.
    """
    from huggingface_hub import DatasetCardData

    kind = one_line(str(manifest.recipe.get("kind")))
    samples = sum(map(manifest.samples, manifest.splits))
    total = sum(count for name in ("n", "val") if isinstance(count := manifest.recipe.get(name), int))
    tars = [{"split": split, "path": f"{split}-*.tar"} for split in sorted(manifest.splits)]
    head = DatasetCardData(
        license=licence(manifest.recipe),
        task_categories=["image-classification"],
        size_categories=[_SIZES[max(len(str(samples)) - 3, 0)]],
        tags=["webdataset", "fractalpretrain", kind],
        configs=[{"config_name": "default", "data_files": tars}],
    )
    split = TRAINING if TRAINING in manifest.splits else next(iter(manifest.splits), "")
    rows = sample_rows(manifest, split, _ROWS, _ROWS, _TILE)
    sheet = io.BytesIO()
    contact_sheet(rows, _TILE).save(sheet, "JPEG", quality=85)
    files = {PREVIEW: sheet.getvalue()}
    if samples >= total:  # not a part, which cannot be built
        with suppress(FractalError):  # packed images have none, and many classes need too large a file
            files[PORTABLE] = export_recipe(manifest)
    text = _describe(manifest, location, kind, split, PORTABLE in files)
    files[README] = f"---\n{head.to_yaml()}\n---\n\n{text}".encode()
    return [Upload.of_bytes(name, data) for name, data in files.items()]


def _describe(manifest: Manifest, location: Location, kind: str, split: str, portable: bool) -> str:
    """Describe a dataset in Markdown: contents, how to read and rebuild it, its recipe and papers."""
    name, _, revision = location.root.removeprefix("datasets/").partition("@")
    arguments = f'"{name}"' + (f', revision="{unquote(revision)}"' if revision else "")
    label = "cls" if manifest.label_type == "single" else "json"
    counts = human_list([f"{manifest.samples(one):,} {one}" for one in manifest.splits])
    numbers = [shard.name[-10:-4] for shard in manifest.splits[split]]
    whole = int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1
    braces = f"{numbers[0]}..{numbers[-1]}" if whole else ",".join(numbers)
    url = f"https://huggingface.co/datasets/{name}/resolve/{revision or 'main'}/{split}-{{{braces}}}.tar"
    fields = flat_recipe(manifest.recipe).items()
    recipe = "\n".join(f"{json.dumps(key)[1:-1]}: {json.dumps(value)}" for key, value in fields)
    rebuild = f"""
Or render the same images, from the small file `{PORTABLE}` in this repository:

    fractalgen build --recipe {PORTABLE} --out shards/{kind}
"""
    return f"""# {name.rpartition("/")[2]}

{counts} images of {manifest.classes:,} classes, kind `{kind}`, in WebDataset shards made with fractalpretrain.

![Images of some classes, one row each]({PREVIEW})

## Read

```python
from datasets import load_dataset
dataset = load_dataset({arguments}, streaming=True)
```

```python
import webdataset
url = "{url}"
dataset = webdataset.WebDataset(url, shardshuffle=False).decode("rgb8").to_tuple("png;jpg;webp", "{label}")
```

```python
from fractaltrain import ShardDataset
dataset = ShardDataset("hf://{location.root}", split="{split}")
```

`fractalshards pull hf://{location.root} shards/{kind}` fetches the shards and checks their hashes.
{rebuild if portable else ""}
## Recipe

Recipe digest `{manifest.recipe_digest}`, content digest `{manifest.content_digest()}`.

```yaml
{recipe}
```
{citation(kind)}"""
