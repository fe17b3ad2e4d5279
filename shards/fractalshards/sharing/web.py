"""A folder of a web server: read only."""

from collections.abc import Generator

from fractalshards.extras import needs_package
from fractalshards.sharing.filesystems import make_filesystem
from fractalshards.sharing.stores import translated
from fractalshards.sharing.urls import Location

_STREAM = 1 << 20  # each piece is a turn of another thread
_TIMEOUT = 30.0


class HttpSource:
    """See ``Source``."""

    steady = False

    def __init__(self, location: Location) -> None:
        with needs_package("http://", "aiohttp", "pip install aiohttp"):
            from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
        # proxies come from the environment; the URL is quoted already, and a signature would not survive a second time
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}
        self._location = location
        self._files = make_filesystem("http", options)

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Source``."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with translated():
            url = self._location.file(name)
            # a block size of 0 streams, and a size, whatever it is, saves asking for it
            options = {"block_size": 0, "size": 1, "headers": headers, "read_bufsize": _STREAM}
            with self._files.open(url, "rb", **options) as file:
                skip = start if file.r.status != 206 else 0  # the server knows no ranges and sends all of it
                while chunk := file.read(_STREAM):
                    if skip < len(chunk):
                        yield chunk[skip:]
                    skip = max(skip - len(chunk), 0)
