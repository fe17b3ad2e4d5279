"""Published hyperparameters, and the parameter groups and schedules that follow from them, computed by hand."""

import re
from dataclasses import asdict, replace
from itertools import product
from math import cos, pi

import pytest
import torch
from torch import nn

from fractalshards.errors import UsageError
from fractaltrain.models import create_model
from fractaltrain.optim import Rates, build_optimizer, build_schedule, parameter_rates
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES, for_dataset
from fractaltrain.recipes.recipe import change, scale_lr
from fractaltrain.stream.order import check_batch

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = (0.5, 0.5, 0.5)

OFF = {
    "undecayed": "norms", "optimizer": "sgd", "momentum": 0.9, "schedule": "onecycle", "head_lr_factor": 1,
    "head_weight_decay": None, "pct_start": 0.3, "div_factor": 25, "final_div_factor": 1e4, "base_momentum": 0.85,
    "max_momentum": 0.95, "warmup_epochs": 0, "warmup_steps": 0, "warmup_lr": 1e-6, "min_lr": 1e-5,
    "milestones": (30, 60), "gamma": 0.1, "clip_grad": None, "augment": "none", "crop": "none", "crop_scale": (0.08, 1),
    "hflip": 0, "vflip": 0, "randaugment": 0, "color_jitter": 0, "erasing": 0, "mixup": 0, "cutmix": 0,
    "label_smoothing": 0, "drop_path": 0, "ema": 0, "repeats": 1, "passes": 1, "mean": (0, 0, 0), "std": (1, 1, 1),
}  # fmt: skip
ANDERSON_FT = {
    "epochs": 150, "batch_size": 64, "pct_start": 0.1, "augment": "affine", "hflip": 0.5, "mean": HALF, "std": HALF,
}  # fmt: skip
DEIT = {
    "undecayed": "vectors", "schedule": "cosine", "crop": "resized", "randaugment": 9, "color_jitter": 0.3,
    "mixup": 0.8, "cutmix": 1, "label_smoothing": 0.1,
}  # fmt: skip
DEIT_PT = {
    **DEIT, "batch_size": 1024, "weight_decay": 0.05, "optimizer": "adamw", "erasing": 0.25, "drop_path": 0.1,
    "mean": HALF, "std": HALF,
}  # fmt: skip
FDSL = {
    **DEIT, **IMAGENET, "color_jitter": 0, "lr": 1e-3, "weight_decay": 0.05, "optimizer": "adamw", "erasing": 0.25,
    "drop_path": 0.1, "warmup_epochs": 5,
}  # fmt: skip
PUBLISHED = {
    "pt rcdb": {**FDSL, "epochs": 300, "batch_size": 256, "repeats": 3},
    "pt visualatom": {
        **FDSL, "epochs": 90, "batch_size": 8192, "repeats": 3, "warmup_epochs": 0, "warmup_steps": 5000,
    },
    "pt onepfrac": {
        **FDSL, "epochs": 240, "passes": 256, "batch_size": 256, "lr": 5e-4, "min_lr": 5e-6, "warmup_lr": 5e-7,
        "warmup_epochs": 0, "warmup_steps": 15, "erasing": 0.5, "hflip": 0.5, "vflip": 0.5, "mean": HALF, "std": HALF,
    },
    "ft fdsl": {
        **FDSL, "epochs": 1000, "batch_size": 768, "lr": 0.015, "min_lr": 1.5e-5, "warmup_lr": 1.5e-6,
        "warmup_epochs": 10, "weight_decay": 1e-4, "optimizer": "sgd", "hflip": 0.5,
    },
    "ft fdsl-imagenet": {**FDSL, "epochs": 300, "batch_size": 1024, "hflip": 0.5},
    "pt anderson": {
        "epochs": 90, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-4, "pct_start": 0, "final_div_factor": 1e3,
    },
    "pt deit": {**DEIT_PT, "epochs": 90, "lr": 1e-3, "warmup_epochs": 5, "hflip": 0.5, "repeats": 3},
    "pt nakashima": {**DEIT_PT, "epochs": 300, "lr": 6e-4, "warmup_epochs": 10},
    "pt kataoka": {
        "epochs": 90, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "undecayed": "none", "schedule": "step",
        "crop": "random", "mean": (0.2,) * 3, "std": HALF,
    },
    "ft anderson": {
        **ANDERSON_FT, "lr": 0.015, "weight_decay": 5e-5, "head_lr_factor": 10, "head_weight_decay": 1e-4,
    },
    "ft anderson-scratch": {**ANDERSON_FT, "lr": 0.15, "weight_decay": 1e-4},
    "ft nakashima": {
        **DEIT, **IMAGENET, "epochs": 150, "batch_size": 512, "lr": 0.01, "weight_decay": 1e-4, "warmup_epochs": 10,
    },
}  # fmt: skip
"""Values of the papers, by task and recipe; values that a recipe does not name here are those of ``OFF``."""


def test_recipes_have_the_published_values():
    tasks = {"pt": PT_RECIPES, "ft": FT_RECIPES}
    found = {f"{task} {name}": asdict(recipe) for task, recipes in tasks.items() for name, recipe in recipes.items()}
    assert found == {name: {**OFF, **values, "name": name.split()[1]} for name, values in PUBLISHED.items()}


PHOTOGRAPHS = {"crop": "resized", "hflip": 0.5, **IMAGENET}


def test_for_dataset():
    for recipe, kinds, values in (
        ("anderson", ["fractaldb"], {"crop": "random", "mean": (0.2,) * 3, "std": HALF}),
        ("anderson", ["imagenet", "imagefolder"], PHOTOGRAPHS),
        ("anderson", ["visualatom", "rcdb", "onepfrac"], {"crop": "resized"}),
        ("anderson", ["single"], {}),
        ("deit", ["imagenet", "imagefolder"], IMAGENET),
        ("deit", ["visualatom", "fractaldb"], {}),
        ("nakashima", ["imagenet"], {}),
    ):
        for kind in kinds:
            assert for_dataset(PT_RECIPES[recipe], kind) == replace(PT_RECIPES[recipe], **values)


def test_change():
    texts = {"epochs": "3", "lr": "1e-2", "mean": "0.2", "std": "0.1,0.2,0.3", "head_weight_decay": "none"}
    values = {"epochs": 3, "lr": 0.01, "mean": (0.2,) * 3, "std": (0.1, 0.2, 0.3), "head_weight_decay": None}
    assert change(FT_RECIPES["anderson"], texts) == replace(FT_RECIPES["anderson"], **values)


@pytest.mark.parametrize(
    "change_",
    [
        *("epoch=3", "name=x", "epochs=1.5", "epochs=0", "lr=fast", "lr=-1", "lr=nan", "weight_decay=inf"),
        *("head_weight_decay=few", "head_weight_decay=-1", "hflip=2", "mean=1,2", "std=0", "clip_grad=0"),
        *("crop=middle", "crop_scale=1,0.5", "crop_scale=0,1", "randaugment=11", "label_smoothing=-0.1", "mixup=-1"),
        *("repeats=0", "schedule=linear", "ema=1", "milestones=60,30", "optimizer=adam", "augment=mixup"),
    ],
)
def test_change_refuses_what_does_not_fit(change_):
    name, _, text = change_.partition("=")
    with pytest.raises(UsageError, match=name):
        change(FT_RECIPES["anderson"], {name: text})


def test_scale_lr():
    recipe = change(PT_RECIPES["anderson"], {"batch_size": "512"})
    assert recipe.lr == 0.1
    scaled = scale_lr(recipe, published_batch_size=64)
    assert (scaled.lr, scaled.warmup_lr, scaled.min_lr) == pytest.approx((0.8, 8e-6, 8e-5))


@pytest.mark.parametrize("recipe", [PT_RECIPES["anderson"], PT_RECIPES["deit"]], ids=["plain", "mixing"])
def test_check_batch_suggests_sizes_that_work(recipe):
    """Following the advice leads to a valid batch, whatever the batch size, processes and samples."""
    ended = set()
    for batch, processes, samples in product(range(1, 13), range(1, 5), range(1, 13)):
        size, message = batch, ""
        for _ in range(4):
            try:
                check_batch(replace(recipe, batch_size=size), processes, 1, samples)
                ended.add("valid")
                break
            except UsageError as error:
                message = str(error)
            if not (advised := re.search(r"--batch-size (?:to )?(\d+)", message)):
                assert samples < processes * (2 if recipe.mixes else 1)
                ended.add("too few samples")
                break
            size = int(advised[1])
        else:
            raise AssertionError(f"{batch}, {processes}, {samples}: {message}")
    assert ended == {"valid", "too few samples"}


def test_check_batch_with_accumulation():
    recipe = replace(PT_RECIPES["anderson"], batch_size=12)
    check_batch(recipe, 2, 3, 12)
    with pytest.raises(UsageError, match="--batch-size to 6"):
        check_batch(recipe, 2, 3, 11)
    with pytest.raises(UsageError, match=r"--accumulate 3.*--batch-size 6"):
        check_batch(replace(recipe, batch_size=8), 2, 3)


# Parameter groups and schedules


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return create_model("vit_tiny_patch16_224", 7, 32)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return create_model("resnet50", 7, 64)


def undecayed(rates: dict[str, Rates]) -> set[str]:
    return {name for name, rate in rates.items() if rate.weight_decay == 0}


def test_anderson_decays_all_but_norms_and_biases(vit, resnet):
    rates = parameter_rates(vit, PT_RECIPES["anderson"])
    assert set(rates) == {name for name, _ in vit.named_parameters()}
    assert undecayed(rates) == {name for name in rates if name.endswith("bias") or "norm" in name}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "head.weight"):
        assert rates[name] == Rates(0.1, 1e-4)
    rates = parameter_rates(resnet, PT_RECIPES["anderson"])
    norms = {name for name in rates if ".bn" in name or name.startswith("bn1") or ".downsample.1." in name}
    assert undecayed(rates) == norms | {"fc.bias"}
    assert {rate.lr for rate in rates.values()} == {0.1}


def test_deit_decays_neither_vectors_nor_embeddings(vit):
    rates = parameter_rates(vit, PT_RECIPES["deit"])
    vectors = {name for name, parameter in vit.named_parameters() if parameter.ndim == 1}
    assert undecayed(rates) == vectors | {"cls_token", "pos_embed"}
    assert {*rates.values()} == {(1e-3, 0), (1e-3, 0.05)}
    optimizer = build_optimizer(vit, PT_RECIPES["deit"])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_kataoka_decays_everything(resnet):
    rates = parameter_rates(resnet, PT_RECIPES["kataoka"])
    assert set(rates) == {name for name, _ in resnet.named_parameters()}
    assert set(rates.values()) == {Rates(0.1, 1e-4)}
    assert build_optimizer(resnet, PT_RECIPES["kataoka"]).param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(("model", "head"), [("vit", "head"), ("resnet", "fc")])
def test_finetuning_trains_the_head_ten_times_faster(model, head, request):
    rates = parameter_rates(request.getfixturevalue(model), FT_RECIPES["anderson"])
    assert rates.pop(f"{head}.weight") == Rates(pytest.approx(0.15), 1e-4)
    assert rates.pop(f"{head}.bias") == Rates(pytest.approx(0.15), 0)
    assert {*rates.values()} == {(0.015, 0), (0.015, 5e-5)}
    scratch = parameter_rates(request.getfixturevalue(model), FT_RECIPES["anderson-scratch"])
    assert {*scratch.values()} == {(0.15, 0), (0.15, 1e-4)}


def test_optimizer_has_every_parameter_once_with_its_rates(resnet):
    recipe = FT_RECIPES["anderson"]
    groups = build_optimizer(resnet, recipe).param_groups
    names = {parameter: name for name, parameter in resnet.named_parameters()}
    placed = [(names[one], (group["lr"], group["weight_decay"])) for group in groups for one in group["params"]]
    assert len(groups) == 4
    assert len(placed) == len(names)
    assert dict(placed) == parameter_rates(resnet, recipe)
    assert groups[0]["lr"] == recipe.lr  # the one that logs show


def rates_of(recipe, epochs: int, epoch_steps: int) -> tuple[list[float], list[float]]:
    """Learning rate and momentum (0 for AdamW) of every step, of the first parameter group."""
    optimizer = build_optimizer(nn.ModuleDict({"fc": nn.Linear(2, 2)}), recipe)
    schedule = build_schedule(optimizer, replace(recipe, epochs=epochs), epoch_steps)
    rates, momenta = [], []
    for _ in range(epochs * epoch_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0].get("momentum", 0))
        optimizer.step()
        schedule.step()
    return rates, momenta


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "start", "peak", "end"),
    [
        ("deit", 20, 50, 1e-6, 1e-3, 1e-5),  # 5 epochs of warm-up
        ("onepfrac", 4, 15, 5e-7, 5e-4, 5e-6),  # 15 steps
    ],
)
def test_cosine_schedule(name, epochs, warmup, start, peak, end):
    """A linear warm-up, then the rest of a cosine over all 200 steps."""
    rise = [start + (peak - start) * step / warmup for step in range(warmup)]
    fall = [end + (peak - end) * (1 + cos(pi * step / 200)) / 2 for step in range(warmup, 200)]
    rates, _ = rates_of(PT_RECIPES[name], epochs, 200 // epochs)
    assert rates == pytest.approx(rise + fall)


def test_warm_up_must_end_before_the_training():
    with pytest.raises(UsageError, match="warmup_epochs"):
        change(PT_RECIPES["deit"], {"epochs": "4"})
    with pytest.raises(UsageError, match="warmup_steps"):
        rates_of(PT_RECIPES["onepfrac"], 3, 5)


def test_step_schedule():
    rates, _ = rates_of(PT_RECIPES["kataoka"], 90, 2)
    assert rates == pytest.approx([0.1] * 60 + [0.01] * 60 + [0.001] * 60)


def test_one_cycle_schedule_without_a_rise():
    """pct_start 0: step k of N is (k + 1) / N down a cosine from lr to lr / 25 / 1000, momentum 0.85 to 0.95."""
    lowest = 0.1 / 25 / 1e3
    shares = [(1 + cos(pi * (step + 1) / 40)) / 2 for step in range(40)]
    rates, momenta = rates_of(PT_RECIPES["anderson"], 1, 40)
    assert rates == pytest.approx([lowest + (0.1 - lowest) * share for share in shares])
    assert momenta == pytest.approx([0.95 - 0.1 * share for share in shares])


def test_one_cycle_schedule_with_a_rise():
    """The rise takes 10 % of 100 steps (0..9), from lr / 25; the fall ends at lr / 25 / 10000 with step 99."""
    rates, momenta = rates_of(FT_RECIPES["anderson-scratch"], 1, 100)
    expected = {
        0: (0.15 / 25, 0.95),
        3: (0.15 / 25 + (0.15 - 0.15 / 25) * (1 - cos(pi / 3)) / 2, 0.95 - 0.1 * (1 - cos(pi / 3)) / 2),
        9: (0.15, 0.85),
        54: (0.15 / 25e4 + (0.15 - 0.15 / 25e4) / 2, 0.90),
        99: (0.15 / 25e4, 0.95),
    }
    for step, (rate, momentum) in expected.items():
        assert (rates[step], momenta[step]) == (pytest.approx(rate), pytest.approx(momentum))


def test_one_cycle_schedule_keeps_the_factor_of_the_head():
    recipe = FT_RECIPES["anderson"]
    optimizer = build_optimizer(nn.ModuleDict({"body": nn.Linear(2, 2), "fc": nn.Linear(2, 2)}), recipe)
    schedule = build_schedule(optimizer, replace(recipe, epochs=1), 50)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([rates[0], rates[0], 10 * rates[0], 10 * rates[0]])


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_one_cycle_schedule_of_very_short_runs(steps):
    """10 steps make torch's OneCycleLR divide by zero at pct_start 0.1."""
    rates, momenta = rates_of(FT_RECIPES["anderson"], 1, steps)
    assert all(0 < rate <= 0.15 + 1e-9 for rate in rates)
    assert all(0.85 <= momentum <= 0.95 for momentum in momenta)
    assert steps == 1 or rates[-1] == pytest.approx(0.15 / 25e4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_step_that_the_loss_scaler_skips_changes_nothing(name):
    """Fused SGD leaves uninitialised momenta, which the next step would apply."""

    def train(gradients: list[float]) -> torch.Tensor:
        model = nn.ModuleDict({"fc": nn.Linear(1, 1, bias=False)})
        nn.init.ones_(model.fc.weight)
        optimizer = build_optimizer(model, replace(FT_RECIPES["anderson"], optimizer=name, lr=0.1), scaled=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for gradient in gradients:
            optimizer.zero_grad()
            scaler.scale(gradient * model.fc.weight.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return model.fc.weight.detach()

    expected = train([1.0, 0.5])
    assert expected < 0.9
    torch.testing.assert_close(train([float("inf"), 1.0, float("inf"), 0.5]), expected)
