"""Check the project on a GPU in ten minutes: run its tests for GPUs, measure speeds, and run a small study.

    python tools/gpu_check.py                            # on a machine with a GPU
    python tools/gpu_check.py --device cpu               # rehearses everything with tiny sizes in two or three minutes

Writes ``gpu_check.json`` and ``gpu_check.md`` into ``--out`` after every part, with a log of each. A part that fails or
runs out of time keeps its results so far; parts without time are reported as not run. Datasets are made in a temporary
folder. Needs no network and no installation: it uses the packages of this checkout, whose requirements must be
installed. Exits with 1 if a test, a measurement or a run failed.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [ROOT / name for name in ("generator", "shards", "trainer", "tests/support", "tools")]
TESTS, STUDY = ROOT / "tests" / "trainer" / "test_gpu.py", ROOT / "studies" / "gpu.toml"
REPORT = "GPU_CHECK_TESTS"  # environment variable: file to which pytest appends the outcome of every test
REQUIREMENTS = {  # modules that all parts need, and the names of their packages
    **{name: name for name in ("click", "filelock", "fsspec", "isal", "msgspec", "numba", "numpy", "rich", "tenacity")},
    **{name: name for name in ("xxhash", "matplotlib", "safetensors", "tensorboard", "timm", "torch", "torchvision")},
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}
SHARES = {"data": 0.2, "tests": 0.45, "speed": 0.78, "study": 1.0}  # of the time, by which each part ends
GRACE = 8.0  # seconds that a study gets to save after SIGTERM, and again to compare what is done
TINY_STUDY = """
[study]
image_size = 32
pretraining = { epochs = 1, batch_size = 20, set = { crop = "none" } }
finetuning = { epochs = 1, batch_size = 10 }
[models.test_vit]
[scratch]
recipe = "anderson-scratch"
[pretraining.single]
shards = "shards/gpu-single.json"
build = "fractalgen recipe --kind single --n 40 --classes 5 --size 32 --points 500 --out shards/gpu-single.json"
[finetuning.digits]
per_class = [2]
"""


@dataclass(frozen=True)
class Sizes:
    """What is measured and trained: at full size, or to try everything out on a CPU."""

    images: str
    models: tuple[str, ...]
    batch: int
    image_size: int
    modes: tuple[str, ...]
    rounds: int
    steps: int
    warmup: int
    workers: int
    jobs: int


def sizes(small: bool, cores: int) -> Sizes:
    """Return the sizes for a machine with this many cores."""
    if small:
        images = "--n 200 --classes 5 --size 32 --points 500"
        return Sizes(images, ("test_resnet",), 8, 32, ("off",), rounds=1, steps=2, warmup=1, workers=1, jobs=1)
    models = ("resnet50", "deit_small_patch16_224")
    workers, jobs = max(min(cores - 2, 14), 1), max(min(cores // 4, 4), 1)
    images = "--n 20000 --size 224"
    return Sizes(images, models, 256, 224, ("off", "on"), rounds=3, steps=20, warmup=10, workers=workers, jobs=jobs)


@dataclass
class Check:
    """One check: what it uses, and the results so far."""

    sizes: Sizes
    small: bool
    on_gpu: bool
    out: Path
    data_dir: Path
    work: Path
    began: float
    seconds: float
    environment: dict[str, str]
    results: dict[str, Any] = field(default_factory=dict)

    def left(self, part: str) -> float:
        """Return the seconds that a part still has."""
        return self.began + SHARES[part] * (self.seconds - 2 * GRACE) - time.monotonic()

    def run(self, part: str, command: Sequence[object], **environment: str) -> str | None:
        """Run a Python program in the temporary folder within the time of its part; return the problem, if any.

        Its output is appended to ``PART.log``.
        """
        left = self.left(part)
        if left < 1:
            return "not run: no time left"
        words = [sys.executable, *map(str, command)]
        with (self.out / f"{part}.log").open("a+") as log:
            print(f"$ {shlex.join(words)}", file=log, flush=True)
            process = subprocess.Popen(
                words, cwd=self.work, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=self.environment | environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                return f"stopped after {left:.0f} s"
            finally:
                _end(process, gently=part == "study")
            return None if code == 0 else f"exit code {code}: {_last_line(log)}"

    def save(self) -> None:
        """Write both files."""
        self.results["minutes"] = round((time.monotonic() - self.began) / 60, 2)
        for name, text in (("json", json.dumps(self.results, indent=1) + "\n"), ("md", page(self.results))):
            path = self.out / f"gpu_check.{name}"
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)


def _end(process: "subprocess.Popen[bytes]", gently: bool) -> None:
    """End a process, if it still runs, and all that it started; gently: its trainings save first."""
    if process.poll() is None and gently:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: TextIO) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "E  ", "ERROR"))]
    return (errors or lines)[-1][:300]


def make_data(check: Check) -> str | None:
    """Make the datasets of the measurement and of the study."""
    text = TINY_STUDY if check.small else STUDY.read_text()
    if not check.small and (check.data_dir / "cifar-10-batches-py").is_dir():
        text += "\n[finetuning.cifar10]\nepochs = 5\nbatch_size = 256\n"
    (check.work / "gpu.toml").write_text(text)
    (check.work / "shards").mkdir()
    commands = [
        f"fractalgen recipe --kind single {check.sizes.images} --out single.json",
        "fractalgen build --recipe single.json --out shards/single",
        *(row["build"] for row in tomllib.loads(text)["pretraining"].values()),
    ]
    for command in commands:
        if problem := check.run("data", ("-m", *shlex.split(command))):
            return problem
    return None


def run_tests(check: Check) -> str | None:
    """Run the tests that need a GPU; on a CPU, rehearse them."""
    if missing := missing_packages({"pytest": "pytest"}):
        return f"not run: {missing}"
    file = check.work / "tests.jsonl"
    options = ["-p", "gpu_check", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib --strict-markers"]
    options += [] if check.on_gpu else ["-k", "not compiled"]  # a CPU takes long, and learns nothing about GPUs
    command = ("-m", "pytest", "-m", "gpu", *options, "--rootdir", ROOT, "-c", ROOT / "pyproject.toml", TESTS)
    rehearsal = {} if check.on_gpu else {"FRACTALTRAIN_TEST_DEVICE": "cpu"}
    problem = check.run("tests", command, **{REPORT: str(file)}, **rehearsal)
    check.results["tests"] = _json_lines(file)
    return problem


def measure(check: Check) -> str | None:
    """Measure training from one resident batch, from shards and rendered."""
    sizes, file = check.sizes, check.work / "speed.json"
    flags = {
        "--shards": ["shards/single"],
        "--render": ["single.json"],
        "--model": sizes.models,
        "--batch": [sizes.batch],
        "--compile": sizes.modes,
        "--amp": ["bf16"],
        "--image-size": [sizes.image_size],
        "--workers": [sizes.workers],
        "--rounds": [sizes.rounds],
        "--steps": [sizes.steps],
        "--warmup": [sizes.warmup],
        "--out": [file],
    }
    options = [word for flag, values in flags.items() for value in values for word in (flag, value)]
    problem = check.run("speed", (ROOT / "tools" / "bench_train.py", *options))
    check.results["speed"] = json.loads(file.read_text())["cases"] if file.exists() else []
    failed = [case["error"] for case in check.results["speed"] if "error" in case]
    return problem or (f"failed: {failed[0]}" if failed else None)


def run_study(check: Check) -> str | None:
    """Run the study; compare what finished."""
    folder = check.work / "runs"
    command = ("-m", "fractaltrain", "study", "gpu.toml", "--out", folder, "--data-dir", check.data_dir)
    problem = check.run("study", (*command, "--jobs", check.sizes.jobs, "--nproc", 1))
    runs = []
    for settings in sorted(folder.glob("*/*/run.json")):
        run = settings.parent
        result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else None
        seconds = max(path.stat().st_mtime for path in run.iterdir()) - settings.stat().st_mtime
        name = str(run.relative_to(folder))
        runs.append({"run": name, "seconds": round(seconds, 1), **_rates(run / "metrics.jsonl"), "result": result})
    check.results["study"] = runs
    table = folder / "table.md"
    if not table.exists() and any(run["result"] for run in runs):  # the study was stopped
        compare = (sys.executable, "-m", "fractaltrain", "compare", str(folder), "--out", str(folder))
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(compare, env=check.environment, capture_output=True, timeout=GRACE)
    check.results["comparison"] = table.read_text() if table.exists() else ""
    return problem


def _rates(metrics: Path) -> dict[str, float]:
    """Return the medians of images/s and of the share of time spent waiting for data."""
    names = ("images_per_s", "waiting")
    found = {name: [line[name] for line in _json_lines(metrics) if line["split"] == "train"] for name in names}
    return {name: median(values) for name, values in found.items() if values}


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, but the last one if a kill cut it off; nothing if there is no file."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


PARTS: dict[str, Callable[[Check], str | None]] = {
    "data": make_data,
    "tests": run_tests,
    "speed": measure,
    "study": run_study,
}


def facts(small: bool) -> dict[str, Any]:
    """Return a description of machine and software."""
    import torch

    cuda = torch.cuda.is_available()
    git = ("git", "-C", str(ROOT))
    changed = _output(*git, "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name(0) if cuda else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numba", "numpy")},
        "cores": len(os.sched_getaffinity(0)),
        "commit": (_output(*git, "rev-parse", "HEAD") or "unknown") + (" with changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "sizes": "small" if small else "full",
    }


def _output(*command: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None


def page(results: Mapping[str, Any]) -> str:
    """Format the results as Markdown."""
    about, parts = results["about"], results["parts"]
    lines = [f"# Check on {about['device']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in about.items() if value is not None]
    lines += [f"| minutes | {results['minutes']} |", "", "| part | seconds | |", "|---|---|---|"]
    lines += [f"| {name} | {part['seconds']} | {_cell(part['problem'] or 'done')} |" for name, part in parts.items()]
    if tests := results.get("tests"):
        counts = Counter(test["outcome"] for test in tests)
        lines += ["", "## Tests", "", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + "."]
        lines += ["", "| test | | seconds | |", "|---|---|---|---|"]
        lines += [f"| `{t['test']}` | {t['outcome']} | {t['seconds']} | {_cell(t['message'])} |" for t in tests]
    if cases := results.get("speed"):
        feeds = list(dict.fromkeys(name for case in cases for name in case.get("feeds", {})))
        lines += ["", "## Speed", "", "Images/s; in brackets, the share of the time spent waiting for data.", ""]
        lines += [
            f"| model | batch | | resident | {' | '.join([*feeds, 'peak memory'])} |",
            "|---" * (5 + len(feeds)) + "|",
        ]
        lines += [_speed_row(case, feeds) for case in cases]
    if runs := results.get("study"):
        lines += [
            "",
            "## Study",
            "",
            "| run | seconds | images/s | waiting | loss | top-1 |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_run_row(run) for run in runs]
        lines += ["", results["comparison"]] if results.get("comparison") else []
    return "\n".join(lines).rstrip() + "\n"


def _speed_row(case: Mapping[str, Any], feeds: Sequence[str]) -> str:
    mode = "compiled" if case["compile"] else "eager"
    title = f"| {case['model']} | {case['batch']} | {mode} | "
    if "error" in case:
        return f"{title}{_cell(case['error'])} |" + " |" * (len(feeds) + 1)
    cells = [f"{case['resident_images_per_s']:,.0f}"]
    for name in feeds:
        feed = case["feeds"].get(name)
        cells.append(f"{feed['images_per_s']:,.0f} ({feed['waiting']:.1%})" if feed else "")
    return title + " | ".join([*cells, f"{case['peak_memory_bytes'] / 1e9:.2f} GB"]) + " |"


def _run_row(run: Mapping[str, Any]) -> str:
    result = run["result"] or {}
    formats = {"images_per_s": "{:,.0f}", "waiting": "{:.1%}", "train_loss": "{:.4f}", "top1": "{:.1%}"}
    values = {**run, **result}
    cells = [text.format(values[name]) if name in values else "" for name, text in formats.items()]
    name = run["run"] + ("" if result else " (not finished)")
    return f"| {name} | {run['seconds']} | {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def missing_packages(needed: Mapping[str, str]) -> str:
    """Return a line that names the packages that cannot be found; empty if there are none."""
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    return f"missing {', '.join(missing)}; python -m pip install {' '.join(missing)}" if missing else ""


def child_environment(device: str, work: Path) -> dict[str, str]:
    """Return the environment of the programs: the packages of this checkout, and a version if they have none."""
    folders = [*map(str, PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        version("fractalpretrain")
    except PackageNotFoundError:  # not installed; manifests record its version
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        metadata = work / "metadata" / f"{project['name']}-{project['version']}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
        folders.append(str(work / "metadata"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts that fit into the time; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit (default: 10)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cpu: as --small on a CPU")
    parser.add_argument("--small", action="store_true", help="tiny models, images and sets: everything runs, briefly")
    parser.add_argument("--parts", nargs="+", choices=[name for name in PARTS if name != "data"], metavar="PART",
                        default=list(PARTS), help="only some of: tests, speed, study")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the study takes CIFAR-10 if it is there")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if missing := missing_packages(REQUIREMENTS):
        print(f"error: {missing}", file=sys.stderr)
        return 1
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and options.device != "cpu":
        print("error: PyTorch finds no GPU; rehearse with --device cpu", file=sys.stderr)
        return 1
    small = options.small or not on_gpu
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("*.log"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        check = Check(
            sizes(small, len(os.sched_getaffinity(0))), small, on_gpu, options.out.resolve(),
            options.data_dir.resolve(), work, began, 60 * options.minutes,
            child_environment("cuda" if on_gpu else "cpu", work), {"about": facts(small), "parts": {}},
        )  # fmt: skip
        for part, act in PARTS.items():
            if part not in options.parts and not (part == "data" and {"speed", "study"} & {*options.parts}):
                continue
            since = time.monotonic()
            try:
                problem = act(check)
            except Exception as error:  # the other parts may work
                problem = f"failed: {type(error).__name__}: {error}"
            seconds = round(time.monotonic() - since, 1)
            check.results["parts"][part] = {"seconds": seconds, "problem": problem or ""}
            check.save()
            print(f"{part}: {problem or 'done'} ({seconds} s)", flush=True)
    print(f"{options.out}: gpu_check.md, gpu_check.json")
    problems = [part["problem"] for part in check.results["parts"].values()]
    return int(any(problem and not problem.startswith(("not run", "stopped")) for problem in problems))


def pytest_runtest_logreport(report: Any) -> None:
    """Append the outcome of a test to a file; pytest calls this with ``-p gpu_check``."""
    if REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
        message = ""
        if report.outcome == "skipped":
            message = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        elif report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash else report.longrepr)
        fields = {
            "test": report.nodeid.rpartition("::")[2],
            "outcome": report.outcome if report.when == "call" or report.outcome == "skipped" else "error",
            "seconds": round(report.duration, 2),
            "message": " ".join(message.split())[:500],
        }
        with open(os.environ[REPORT], "a") as file:
            file.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what runs, and removes the temporary folder
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; results so far are kept", file=sys.stderr)
        sys.exit(130)
