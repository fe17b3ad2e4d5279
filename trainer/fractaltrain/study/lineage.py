"""What runs were made from: the content of datasets, and the weights of a pre-training. Either may be made again."""

from functools import cache
from pathlib import Path

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.foreign import is_foreign
from fractalshards.manifest import load_manifest
from fractalshards.sharing.urls import parse_location
from fractaltrain.run_folder import RUN, read_settings
from fractaltrain.study.config import Study


def find_digests(study: Study) -> dict[str, str]:
    """Content digests of all datasets of ours that lie finished on this machine, by the name that steps use."""
    digests = {}
    for source, place in study.shards().items():
        try:
            location = parse_location(place)
            if location.scheme == "file" and not is_foreign(Path(location.root)):
                digests[source] = load_manifest(Path(location.root)).content_digest()
        except (FractalError, OSError):
            continue  # who needs it says what is wrong
    return digests


def outdated(folder: Path, run: str, start: str | None) -> str | None:
    """What is wrong with a fine-tuning in a study's folder: it began from other weights than the run ``start`` has now.

    None: nothing; or there is no such run, or nothing left to tell by.

    Raises:
        FractalError: if its ``run.json`` is damaged.
    """
    if start is None or not (folder / run / RUN).is_file():
        return None
    from fractaltrain.checkpoint import list_checkpoints  # it needs torch

    weights = read_settings(folder / run).get("weights")
    checkpoints = list_checkpoints(folder / start)
    if not checkpoints or any(_sha256(path, path.stat().st_mtime_ns) == weights for path in reversed(checkpoints)):
        return None
    return f"began from other weights than {folder / start} has now, which was trained again; remove it"


@cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Of a file as it was then: many fine-tunings ask for that of the same one."""
    return sha256_file(path)
