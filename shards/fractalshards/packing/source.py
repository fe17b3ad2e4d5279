"""Where images to pack come from, as the command line says it: ``imagefolder:PATH`` or ``imagenet:PATH``."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from fractalshards.errors import FractalError, UsageError
from fractalshards.overrides import nearest
from fractalshards.packing.ilsvrc import list_ilsvrc
from fractalshards.packing.image_folder import holds_splits, list_folder
from fractalshards.packing.listing import ImageListing

KINDS = ("imagefolder", "imagenet")
SPLITS = ("train", "val")
_NUMBER = re.compile(r"\d*\.?\d+", re.ASCII)
_SPLIT_ADVICE = "give shares as train=0.9,val=0.1 or folders as train=DIR,val=DIR"


@dataclass(frozen=True)
class Source:
    """Images to pack: ``val_share`` of every class are held out, or ``folders`` hold the splits, if either is given."""

    kind: str
    path: Path
    val_share: Fraction | None = None
    folders: Mapping[str, str] | None = None

    def list_images(self, out: Path) -> ImageListing:
        """List the images; dealing them to splits is left to do.

        Args:
            out: where shards will go: not into an image folder, where they would be taken for a class.

        Raises:
            FractalError: if the source is not as it should be.
            OSError: if it cannot be read.
        """
        if self.kind == "imagenet":
            return list_ilsvrc(self.path, with_val=self.val_share is None)
        if not self.path.is_dir():
            raise FractalError(f"{self.path}: no such folder; give the folder that holds the images")
        if out.resolve().is_relative_to(self.path.resolve()):
            raise FractalError(f"{out}: lies in the image folder {self.path}; choose a folder outside of it")
        if self.val_share is not None and holds_splits(self.path):
            raise UsageError(f"shares are for PATH/CLASS/*, but {self.path} holds train/CLASS/*; give its folder train")
        return list_folder(self.path, self.folders)


def parse_source(text: str, split: str | None) -> Source:
    """A source from ``KIND:PATH`` and the text of ``--split``.

    Raises:
        UsageError: if either is malformed, or they do not fit each other.
    """
    kind, colon, place = text.partition(":")
    if not (colon and place):
        raise UsageError(f"{text!r}: expected {' or '.join(f'{one}:PATH' for one in KINDS)}")
    if kind not in KINDS:
        raise UsageError(f"unknown source {kind!r}{nearest(kind, KINDS)}")
    path = Path(os.path.expanduser(place))  # shells leave a ~ alone that does not come first
    if split is None:
        return Source(kind, path)
    values = _parse_split(split)
    if not all(_NUMBER.fullmatch(value) for value in values.values()):
        if kind == "imagenet":
            raise UsageError(f"--split {split}: ImageNet's archives are no folders; give shares as train=0.98,val=0.02")
        return Source(kind, path, folders=values)
    shares = {name: Fraction(value) for name, value in values.items()}
    if sum(shares.values()) != 1 or set(shares) != set(SPLITS) or not all(shares.values()):
        raise UsageError(
            f"--split {split}: shares of train and val must be above 0 and add up to 1; "
            "write a folder that is named by a number as ./2012"
        )
    return Source(kind, path, val_share=shares["val"])


def _parse_split(text: str) -> dict[str, str]:
    """``train=A,val=B`` as a mapping, train first."""
    pairs = [part.strip().partition("=") for part in text.split(",")]
    values = {name: value for name, _, value in pairs}
    if len(values) != len(pairs) or not all(values.values()) or "train" not in values or not set(values) <= set(SPLITS):
        raise UsageError(f"--split {text}: {_SPLIT_ADVICE}")
    if len({bool(_NUMBER.fullmatch(value)) for value in values.values()}) != 1:
        raise UsageError(f"--split {text}: a share and a folder; {_SPLIT_ADVICE}")
    return {name: values[name] for name in SPLITS if name in values}
