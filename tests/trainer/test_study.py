"""Studies: what a file says, the steps that come of it, and the table at the end."""

import json

import pytest

from fractalshards.errors import UsageError
from fractaltrain.comparison.write import write_comparison
from fractaltrain.study.config import read_study
from fractaltrain.study.plan import plan_study

STUDY = """
[study]
image_size = 16
seeds = [0, 1]
[models.resnet10t]
[scratch]
[pretraining.small]
shards = "shards/small"
epochs = 3
[finetuning.digits]
per_class = [5, 10]
subset_seeds = [0, 1, 2]
"""


def test_a_pretraining_is_shared_by_its_finetunings(tmp_path):
    (tmp_path / "s.toml").write_text(STUDY)
    groups = plan_study(read_study(tmp_path / "s.toml"), tmp_path, tmp_path)
    assert [bool(group.pretraining) for group in groups] == [False, False, True, True]
    assert all(len(group.finetunings) == 6 for group in groups)
    runs = [step.run for group in groups for step in group.finetunings]
    assert len(set(runs)) == 24
    assert groups[2].pretraining.settings["recipe"]["epochs"] == 3
    assert {step.settings["recipe"]["name"] for step in groups[0].finetunings} == {"anderson-scratch"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds", "seed", r"\[study\] has no field 'seed', did you mean 'seeds'"),
        ("epochs = 3", 'recipe = "andersen"', "recipe is 'andersen', did you mean 'anderson'"),
        ("epochs = 3", "epochs = 0", "epochs is 0, but must be at least 1"),
        ("epochs = 3", 'models = ["resnet50"]', "names the model 'resnet50'"),
        ("[finetuning.digits]", "[finetuning.digitz]", "data is 'digitz', did you mean 'digits'"),
        ("image_size = 16", "", "needs image_size"),
        ("[study]", "[study", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, old, new, words):
    (tmp_path / "s.toml").write_text(STUDY.replace(old, new, 1))
    with pytest.raises(UsageError, match=words) as caught:
        read_study(tmp_path / "s.toml")
    assert str(tmp_path / "s.toml") in str(caught.value)


def test_means_and_spread(tmp_path):
    cells = (("small", "a", (0.5, 0.7)), ("scratch", "a", (0.25,)), ("scratch", "b", (0.2, 0.2)))
    for row, model, shares in cells:
        for seed, share in enumerate(shares):
            folder = tmp_path / f"digits--{row}--{model}--seed{seed}"
            folder.mkdir()
            settings = {"task": "ft", "data": "digits", "per_class": None, "model": model, "seed": seed}
            (folder / "run.json").write_text(json.dumps({"settings": settings}))
            (folder / "result.json").write_text(json.dumps({"top1": share, "best_top1": share}))
    table = write_comparison([tmp_path], tmp_path / "out")
    assert "| digits | a | 25.0 (1) | 60.0 ± 14.1 (2) |" in table
    assert "| digits | b | 20.0 ± 0.0 (2) | missing |" in table
    assert "digits,b,small,0,,,," in (tmp_path / "out" / "table.csv").read_text()
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
