"""The label of a sample and its file in the tar: ``KEY.cls``, an ASCII class index."""

from collections.abc import Mapping

from fractalshards.errors import FractalError

SINGLE = "cls"
_MAX_DIGITS = 9


def encode_label(label: int) -> bytes:
    """The bytes of ``KEY.cls``: the class index in ASCII digits."""
    return b"%d" % label


def decode_label(files: Mapping[str, bytes]) -> int:
    """The class index of a sample from its files by extension.

    Raises:
        FractalError: if there is no ``cls`` file or it is not an ASCII integer of at most nine digits.
    """
    text = files.get(SINGLE)
    if text is None:
        raise FractalError(f"no label: expected a .{SINGLE} file beside {sorted(files)}")
    if not (text.isdigit() and len(text) <= _MAX_DIGITS):
        raise FractalError(f"label {text[:20]!r} is not a class index")
    return int(text)
