import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "bench_train.py"


def test_bench_runs_where_there_is_no_gpu(dataset, tmp_path):
    """Tiny: what it measures here means nothing, but it must run on the day a GPU is at hand."""
    options = "--model resnet10t --batch 8 --compile off --image-size 16 --workers 1 --rounds 1 --steps 2 --warmup 1"
    out = tmp_path / "bench.json"
    command = [sys.executable, TOOL, "--shards", dataset, *options.split(), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert (case["model"], case["batch"], case["compile"], case["workers"]) == ("resnet10t", 8, False, 1)
    assert case["resident_images_per_s"] > 0
    assert case["share_of_resident"] > 0
    assert 0 <= case["waiting"] <= 1
    assert case["peak_memory_bytes"] > 1e6
    assert "resident" in done.stdout.splitlines()[1]
