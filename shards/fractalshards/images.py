"""The image of a sample and its file in the tar: ``KEY.png``, ``KEY.jpg`` or ``KEY.webp``, told by what is in it."""

from collections.abc import Mapping

from fractalshards.errors import FractalError
from fractalshards.labels import label_extension

PNG = "png"


def image_format(data: bytes) -> str | None:
    """The extension that an encoded image has in a shard, by its first bytes; None if shards hold no such images."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


def image_extension(files: Mapping[str, bytes]) -> str:
    """Which of a sample's files, by extension, is its image: the one beside the label.

    Raises:
        FractalError: if there is not one image and one label.
    """
    label = label_extension(files)
    images = [extension for extension in files if extension != label]
    if len(images) != 1:
        raise FractalError(f"expected one image, found {images or 'none'}")
    return images[0]
