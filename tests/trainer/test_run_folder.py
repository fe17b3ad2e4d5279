import json

import pytest

from fractalshards.errors import FractalError
from fractaltrain.run_folder import append_metrics, open_run, read_metrics, rewind_metrics, trained_model


def test_metrics_survive_a_line_that_was_cut_off(tmp_path):
    for step in (1, 2, 3):
        append_metrics(tmp_path, {"global_step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_st')
    assert [line["global_step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    rewind_metrics(tmp_path, 2)
    append_metrics(tmp_path, {"global_step": 9})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [1, 2, 9]


def test_same_settings_open_the_same_run(tmp_path):
    settings = {"model": "m", "image_size": 32, "recipe": {"mean": (0.5, 0.5)}}  # tuples become lists in JSON
    open_run(tmp_path / "a" / "run", settings, {"python": "3"})
    open_run(tmp_path / "a" / "run", settings, {"python": "4"})
    assert json.loads((tmp_path / "a" / "run" / "run.json").read_text())["environment"] == {"python": "3"}
    assert trained_model(tmp_path / "a" / "run") == ("m", 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"lr": 2}}, r"holds a run with recipe\.lr 1, not 2; choose another folder"),
        ({"recipe": {"lr": 1, "new": 3}}, r"holds a run without recipe\.new, not with 3"),
        ({"seed": 1, "recipe": {"lr": 2}}, r"holds a run with seed 0, not 1, and 1 other difference; choose"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    settings = {"seed": 0, "recipe": {"lr": 1}}
    open_run(tmp_path, settings, {})
    with pytest.raises(FractalError, match=message):
        open_run(tmp_path, settings | change, {})


def test_damaged_run_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(FractalError, match=r"run\.json: not valid JSON"):
        trained_model(tmp_path)
    (tmp_path / "run.json").write_text('{"settings": {"model": 3}}')
    with pytest.raises(FractalError, match=r"run\.json: settings: model is missing or not text"):
        trained_model(tmp_path)
