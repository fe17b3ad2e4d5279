"""Where datasets lie: local folders and URLs, which of them are taken, and how they are shown. Pure functions."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

from fractalshards.errors import UsageError

Scheme = Literal["file", "http", "s3", "gs", "hf"]

_SCHEMES: dict[str, Scheme] = {
    "file": "file", "http": "http", "https": "http", "s3": "s3", "gs": "gs", "gcs": "gs", "hf": "hf",
}  # fmt: skip
_KNOWN = "a local folder, s3://, gs://, hf://datasets/, http:// or https://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_SECRETS = ((re.compile(r"//[^/@\s]*@"), "//***@"), (re.compile(r"(://[^\s'\"<>)?]*)\?[^\s'\"<>),]*"), r"\1?***"))


@dataclass(frozen=True)
class Location:
    """A folder somewhere.

    Attributes:
        scheme: decides how it is reached.
        root: as the store wants it: a path, ``bucket/key``, or for http a URL without its query.
        query: of an http URL, goes behind every file's name: signatures and tokens stand there.
        shown: the URL without credentials, for messages.
    """

    scheme: Scheme
    root: str
    query: str
    shown: str

    def file(self, name: str) -> str:
        """A file of the folder, as the store wants it."""
        path = f"{self.root}/{name}"
        return f"{path}?{self.query}" if self.query else path


def parse_location(text: str) -> Location:
    """Read a local path or a URL of a folder.

    Only schemes that fetch bytes are taken: fsspec would also chain URLs (``simplecache::``), and open archives and
    references that name further files.

    Raises:
        UsageError: for any other scheme, or a URL that names no folder.
    """
    shown = redact(text)
    if "::" in text:
        raise UsageError(f"{shown}: chained URLs are not taken; give {_KNOWN}")
    match = _SCHEME.match(text)
    if match is None:
        if not text:
            raise UsageError(f"an empty URL; give {_KNOWN}")
        return Location("file", str(Path(text)), "", str(Path(text)))
    scheme = _SCHEMES.get(match[1].lower())
    if scheme is None or not text[match.end() :].startswith("//"):
        raise UsageError(f"{shown}: not a kind of URL that is taken; give {_KNOWN}")
    rest = text[match.end() + 2 :].rstrip("/")
    if scheme == "http":
        return _parse_http(text, shown)
    if scheme == "file":
        if not rest.startswith("/"):
            raise UsageError(f"{shown}: a file URL has three slashes and a whole path, file:///data/set")
        return Location(scheme, rest, "", rest)
    if "@" in rest.split("/")[0]:
        raise UsageError(f"{shown}: credentials do not belong into a URL; give them as the store's own tools take them")
    if not rest or rest.startswith("/") or (scheme == "hf" and not re.match(r"datasets/[^/]+/[^/]+", rest)):
        example = "hf://datasets/USER/NAME" if scheme == "hf" else f"{scheme}://BUCKET/FOLDER"
        raise UsageError(f"{shown}: names no folder; write {example}")
    return Location(scheme, rest, "", shown.rstrip("/"))


def redact(text: str) -> str:
    """Text in which URLs have lost what may be secret: user and password, and the query."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _parse_http(text: str, shown: str) -> Location:
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, an IPv6 address without its bracket
        named = False
    if not named or parts.fragment:
        raise UsageError(f"{shown}: not the URL of a folder; write https://HOST/FOLDER")
    path = quote(parts.path.rstrip("/"), safe="/%~!$&'()*+,;=:@")
    root = urlunsplit((parts.scheme.lower(), parts.netloc, path, "", ""))
    return Location("http", root, quote(parts.query, safe="%/?:@!$&'()*+,;=~"), redact(root))
