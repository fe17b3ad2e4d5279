"""What tests share: processors only, no deadlines, and where the reference data lies (never copied in here)."""

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; GPUs are measured by tools
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB; tests that need it are skipped for users who may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Output of the published renderers; tests that need it are skipped where it is not there."""
    folder = Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip("the reference data does not lie beside the project")
    return folder


@pytest.fixture(scope="session")
def image_file() -> Callable[..., bytes]:
    """Makes the bytes of an image file: a smooth random picture in a format and mode of Pillow."""

    def encode(form: str, width: int, height: int, seed: int, mode: str = "RGB") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).convert(mode).save(buffer, form)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def image_folder(image_file: Callable[..., bytes]) -> Callable[..., Path]:
    """Makes ``folder/CLASS/*.jpg``: so many JPEGs of each class, of several sizes, numbered and all different."""

    def make(folder: Path, classes: dict[str, int], first: int = 0) -> Path:
        seed = first
        for name, count in classes.items():
            (folder / name).mkdir(parents=True)
            for _ in range(count):
                data = image_file("JPEG", 20 + seed % 13, 40 - seed % 7, seed)
                (folder / name / f"{seed:03d}.jpg").write_bytes(data)
                seed += 1
        return folder

    return make
