"""Fixtures of all tests: small disks, images, web and S3 servers, the reference data.

``pytest -m gpu`` runs the tests that need a GPU; all others see none, so that they are the same on every machine.
"""

import http.server
import io
import os
import signal
import subprocess
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from fractalshards import workers
from fractalshards.remote import stores

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make processes in the background ignore it
os.environ["OMP_NUM_THREADS"] = "1"  # also in subprocesses: images this small are slower with more
with suppress(ImportError):  # tests of GPUs do without
    from hypothesis import settings

    settings.register_profile("any-machine", deadline=None)
    settings.load_profile("any-machine")


def pytest_configure(config: pytest.Config) -> None:
    """Hide all GPUs, before anything imports torch, unless the tests that need one were asked for."""
    if config.getoption("markexpr") != "gpu" or rehearsing():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as --deterministic does; read once per process


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not rehearsing():
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and pytest -m gpu")


def rehearsing() -> bool:
    """Whether the tests that need a GPU are to be rehearsed on a CPU."""
    return os.environ.get("FRACTALTRAIN_TEST_DEVICE") == "cpu"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests, and the processes that they start, out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TMPDIR", raising=False)
        yield


@pytest.fixture(autouse=True)
def no_safe_path() -> None:
    """Undo what commands that ran in this process set for the processes that they start."""
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    with _mounted(tmp_path / "disk", "size=600k") as disk:
        yield disk


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty, read-only file system."""
    with _mounted(tmp_path / "read-only", "ro") as disk:
        yield disk


@contextmanager
def _mounted(disk: Path, options: str) -> Iterator[Path]:
    """A small file system; tests that need it are skipped for users who may not mount one."""
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry failed transfers without a delay."""
    monkeypatch.setattr(stores, "_RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use threads instead of worker processes, which take half a second to start."""
    monkeypatch.setattr(workers, "_Pool", ThreadPoolExecutor)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Output of the published renderers; tests that need it are skipped without it."""
    folder = Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip("the reference data is missing")
    return folder


@pytest.fixture(scope="session")
def image_file() -> Callable[..., bytes]:
    """Function that returns the bytes of an image file: a smooth random picture in a format and mode of Pillow."""

    def encode(form: str, width: int, height: int, seed: int, mode: str = "RGB") -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).convert(mode).save(buffer, form)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def image_folder(image_file: Callable[..., bytes]) -> Callable[..., Path]:
    """Function that writes ``folder/CLASS/*.jpg``: different JPEGs of several sizes, counted by class, numbered."""

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


class WebServer:
    """A web server that fails on demand.

    ``faults`` lists by file name what happens to the next requests: ``cut`` closes the connection half way, ``flip``
    changes a byte, a number is the status of the answer, ``endless`` never stops sending, ``hang`` stops half way,
    sets ``hanging`` and waits for ``let_go``. ``[fault, "forever"]`` repeats a fault.
    ``requests`` holds the file names of all requests.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.hanging, self.let_go = threading.Event(), threading.Event()
        self.requests: list[str] = []
        self.queries: set[str] = set()
        methods = {"do_GET": lambda request: self._answer(request, folder), "log_message": lambda *_: None}
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), methods)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *arguments: None  # clients that disconnect
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Refuse connections from now on."""
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, name: str) -> int:
        """Return the number of requests for a file."""
        return self.requests.count(name)

    def _fault(self, name: str) -> str:
        faults = self.faults.get(name, [])
        if faults[1:] == ["forever"]:
            return faults[0]
        return faults.pop(0) if faults else ""

    def _answer(self, request: http.server.BaseHTTPRequestHandler, folder: Path) -> None:
        path, _, query = request.path.partition("?")
        name = unquote(path).rpartition("/")[2]
        self.requests.append(name)
        self.queries.add(query)
        fault = self._fault(name)
        file = folder / unquote(path).lstrip("/")
        if fault.isdigit() or not file.is_file():
            request.send_error(int(fault or 404))
            return
        data = bytearray(file.read_bytes())
        request.send_response(200)
        if fault == "endless":
            request.end_headers()
            with suppress(OSError):
                while True:
                    request.wfile.write(bytes(1 << 16))
        if fault == "flip":
            data[len(data) // 2] ^= 1
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        half = len(data) // 2
        with suppress(OSError):
            request.wfile.write(data[:half])
            if fault == "hang":
                self.hanging.set()
                self.let_go.wait(60)
            if fault != "cut":
                request.wfile.write(data[half:])


@pytest.fixture
def web() -> Iterator[Callable[[Path], WebServer]]:
    """Function that starts a web server for a folder."""
    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(closing(WebServer(folder)))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of a server that speaks S3."""
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket, ``s3://...``; environment variables lead commands and libraries to the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    return f"s3://{name}"
