"""A folder of a dataset repository on the Hugging Face hub, where every change is a commit.

The hub limits commits per hour, and of two at a time it refuses one: many files go in each, one commit after the other.
"""

import re
import threading
from collections.abc import Collection, Generator, Sequence
from typing import Any
from urllib.parse import unquote

from fractalshards.extras import needs_package
from fractalshards.sharing.filesystems import find_info, make_filesystem, read_blocks
from fractalshards.sharing.stores import (
    Advance,
    Change,
    StoreError,
    Told,
    Upload,
    check_arrived,
    read_small,
    translated,
)
from fractalshards.sharing.urls import Location

CARD = "README.md"
_TOGETHER = 32
_ROOT = re.compile(r"datasets/([^/]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")


class HubStore:
    """See ``Store``."""

    steady = False
    tells = True
    together = _TOGETHER

    def __init__(self, location: Location) -> None:
        install = "pip install '.[hub]' in a clone of the project"
        with needs_package("hf://", "huggingface_hub", install), translated():
            self._files = make_filesystem("hf", {"use_listings_cache": False})
            from huggingface_hub import HfApi

        match = _ROOT.fullmatch(location.root)
        if match is None:
            raise StoreError("names no dataset; write hf://datasets/USER/NAME")
        self._location = location
        self._api = HfApi()
        self._turn = threading.Lock()
        self._folder = f"{match[3]}/" if match[3] else ""
        revision = unquote(match[2]) if match[2] else None
        self._repository: dict[str, Any] = {"repo_id": match[1], "repo_type": "dataset", "revision": revision}
        self.wants_card = not self._folder  # elsewhere the hub does not look for it

    def prepare(self) -> None:
        """Nothing needs doing."""

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Source``."""
        return read_blocks(self._files, self._location.file(name), start)

    def told(self, name: str) -> Told | None:
        """See ``Store``. The hub knows the sha256 of large files."""
        info = find_info(self._files, self._location.file(name))
        return info and Told(int(info["size"]), (info.get("lfs") or {}).get("sha256"))

    def put(self, uploads: Sequence[Upload], advance: Advance) -> None:
        """See ``Store``. All come with one commit."""
        self._commit(uploads, None)
        advance(sum(upload.told.size for upload in uploads))

    def update(self, name: str, most: int, change: Change) -> None:
        """See ``Store``: the hub refuses a commit upon one that is not the newest."""
        with translated():
            newest = self._api.repo_info(**self._repository).sha
        before = read_small(self, name, most)
        if (after := change(before)) != before:
            self._commit([Upload.of_bytes(name, after)], newest)

    def _commit(self, uploads: Sequence[Upload], newest: str | None) -> None:
        from huggingface_hub import CommitOperationAdd

        for upload in uploads:
            upload.check()
        message = f"Add {uploads[0].name}" + (f" and {len(uploads) - 1} more files" if uploads[1:] else "")
        with self._turn, translated():
            files = [CommitOperationAdd(f"{self._folder}{upload.name}", upload.content) for upload in uploads]
            self._api.create_commit(operations=files, commit_message=message, parent_commit=newest, **self._repository)
        for upload in uploads:
            check_arrived(self, upload)


def dataset_card(before: bytes | None, splits: Collection[str]) -> bytes:
    """A ``README.md`` by which ``load_dataset`` and the hub's viewer take the tars, and not the sidecars, for data.

    One that was there ``before`` stays, unless it is ours of fewer splits.
    """
    if before is not None and before not in map(_card, (("train",), ("val",))):
        return before
    return _card(sorted(splits))


def _card(splits: Collection[str]) -> bytes:
    files = "".join(f'  - {{split: {name}, path: "{name}-*.tar"}}\n' for name in splits)
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n"
    text = "WebDataset shards made with fractalpretrain; `fractalshards pull` fetches and checks them.\n"
    return f"{head}{text}".encode()
