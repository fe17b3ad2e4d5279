from dataclasses import replace
from math import cos, pi

import pytest
import torch
from torch import nn

from fractaltrain.models import create_model
from fractaltrain.optim import Rates, build_optimizer, build_schedule, parameter_rates
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return create_model("vit_tiny_patch16_224", 7, 32)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return create_model("resnet50", 7, 64)


def test_pretraining_decays_all_but_norms_and_biases(vit, resnet):
    rates = parameter_rates(vit, PT_RECIPES["anderson"])
    assert set(rates) == {name for name, _ in vit.named_parameters()}
    undecayed = {name for name, rate in rates.items() if rate.weight_decay == 0}
    assert undecayed == {name for name in rates if name.endswith("bias") or "norm" in name}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "head.weight"):
        assert rates[name] == Rates(0.1, 1e-4)
    rates = parameter_rates(resnet, PT_RECIPES["anderson"])
    undecayed = {name for name, rate in rates.items() if rate.weight_decay == 0}
    assert undecayed == {name for name in rates if ".bn" in name or name.startswith("bn1")} | {
        f"layer{layer}.0.downsample.1.{kind}" for layer in (1, 2, 3, 4) for kind in ("weight", "bias")
    } | {"fc.bias"}
    assert {rate.lr for rate in rates.values()} == {0.1}


@pytest.mark.parametrize(("fixture", "head"), [("vit", "head"), ("resnet", "fc")])
def test_finetuning_teaches_the_classifier_ten_times_faster(fixture, head, request):
    model = request.getfixturevalue(fixture)
    rates = parameter_rates(model, FT_RECIPES["anderson"])
    assert rates.pop(f"{head}.weight") == Rates(pytest.approx(0.15), 1e-4)
    assert rates.pop(f"{head}.bias") == Rates(pytest.approx(0.15), 0)
    assert {rate.lr for rate in rates.values()} == {0.015}
    assert {rate.weight_decay for rate in rates.values()} == {0, 5e-5}


def test_scratch_has_no_classifier_group(resnet):
    rates = parameter_rates(resnet, FT_RECIPES["anderson-scratch"])
    assert rates["fc.weight"] == rates["conv1.weight"] == Rates(0.15, 1e-4)


def test_optimizer_has_every_parameter_once_with_its_rates(resnet):
    recipe = FT_RECIPES["anderson"]
    optimizer = build_optimizer(resnet, recipe)
    rates = parameter_rates(resnet, recipe)
    names = {parameter: name for name, parameter in resnet.named_parameters()}
    placed = {
        names[parameter]: Rates(group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert placed == rates
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    assert len(optimizer.param_groups) == 4
    assert optimizer.param_groups[0]["lr"] == recipe.lr  # the one that progress and metrics show


def test_deit_decays_neither_vectors_nor_embeddings(vit):
    rates = parameter_rates(vit, PT_RECIPES["deit"])
    undecayed = {name for name, rate in rates.items() if rate.weight_decay == 0}
    assert undecayed == {name for name, parameter in vit.named_parameters() if parameter.ndim == 1} | {
        "cls_token", "pos_embed"
    }  # fmt: skip
    assert {rate.weight_decay for rate in rates.values()} == {0, 0.05}
    assert {rate.lr for rate in rates.values()} == {1e-3}
    optimizer = build_optimizer(vit, PT_RECIPES["deit"])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_kataoka_decays_all(resnet):
    rates = parameter_rates(resnet, PT_RECIPES["kataoka"])
    assert set(rates) == {name for name, _ in resnet.named_parameters()}
    assert set(rates.values()) == {Rates(0.1, 1e-4)}
    assert build_optimizer(resnet, PT_RECIPES["kataoka"]).param_groups[0]["momentum"] == 0.9


def test_what_is_frozen_is_not_optimised():
    model = create_model("resnet10t", 3, 32)
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    (group,) = build_optimizer(model, PT_RECIPES["kataoka"]).param_groups
    assert [parameter.shape for parameter in group["params"]] == [(3, 512), (3,)]


def rates_of(recipe, epochs: int, epoch_steps: int) -> list[float]:
    """Learning rate of every step."""
    optimizer = build_optimizer(nn.ModuleDict({"fc": nn.Linear(2, 2)}), recipe)
    schedule = build_schedule(optimizer, replace(recipe, epochs=epochs), epoch_steps)
    rates = []
    for _ in range(epochs * epoch_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_by_hand():
    """Of 20 epochs of 10 steps: 5 of warm-up from 1e-6 towards 1e-3, then what is left of a cosine over all 200."""
    rates = rates_of(PT_RECIPES["deit"], 20, 10)
    assert rates[0] == pytest.approx(1e-6)
    assert rates[25] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[50] == pytest.approx(1e-5 + 9.9e-4 * (1 + cos(pi / 4)) / 2)
    assert rates[100] == pytest.approx(1e-5 + 9.9e-4 / 2)
    assert rates[199] == pytest.approx(1e-5 + 9.9e-4 * (1 + cos(pi * 199 / 200)) / 2)
    assert max(rates) == rates[49] == pytest.approx(1e-6 + 9.99e-4 * 49 / 50)


def test_steps_by_hand():
    rates = rates_of(PT_RECIPES["kataoka"], 90, 2)
    assert rates == pytest.approx([0.1] * 60 + [0.01] * 60 + [0.001] * 60)


def curve(recipe, steps: int) -> list[tuple[float, float]]:
    """(learning rate, momentum) of the first group, as each of ``steps`` optimiser steps uses them."""
    optimizer = build_optimizer(nn.ModuleDict({"fc": nn.Linear(2, 2)}), recipe)
    schedule = build_schedule(optimizer, replace(recipe, epochs=1), steps)
    points = []
    for _ in range(steps):
        points.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        schedule.step()
    return points


def test_pretraining_schedule_by_hand():
    """pct_start 0: step k of N is (k + 1) / N down a cosine from lr to lr / 25 / 1000, momentum 0.85 to 0.95."""
    lowest = 0.1 / 25 / 1e3
    for step, (lr, momentum) in enumerate(curve(PT_RECIPES["anderson"], 40)):
        share = (1 + cos(pi * (step + 1) / 40)) / 2
        assert lr == pytest.approx(lowest + (0.1 - lowest) * share)
        assert momentum == pytest.approx(0.95 - 0.1 * share)


def test_finetuning_schedule_by_hand():
    """The rise takes 10 % of 100 steps (0..9), from lr / 25; the fall ends at lr / 25 / 10000 with step 99."""
    points = curve(FT_RECIPES["anderson-scratch"], 100)
    expected = {
        0: (0.15 / 25, 0.95),
        3: (0.15 / 25 + (0.15 - 0.15 / 25) * (1 - cos(pi / 3)) / 2, 0.95 - 0.1 * (1 - cos(pi / 3)) / 2),
        9: (0.15, 0.85),
        54: (0.15 / 25e4 + (0.15 - 0.15 / 25e4) / 2, 0.90),
        99: (0.15 / 25e4, 0.95),
    }
    for step, (lr, momentum) in expected.items():
        assert points[step] == (pytest.approx(lr), pytest.approx(momentum))


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_schedule_of_very_short_runs(steps):
    """10 steps make torch's OneCycleLR divide by zero at pct_start 0.1."""
    points = curve(FT_RECIPES["anderson"], steps)
    assert all(0 < lr <= 0.15 + 1e-9 and 0.85 <= momentum <= 0.95 for lr, momentum in points)
    if steps > 1:
        assert points[-1][0] == pytest.approx(0.15 / 25e4)


def test_head_keeps_its_factor_along_the_schedule(vit):
    recipe = FT_RECIPES["anderson"]
    optimizer = build_optimizer(vit, recipe)
    schedule = build_schedule(optimizer, replace(recipe, epochs=1), 50)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    names = {parameter: name for name, parameter in vit.named_parameters()}
    lr = {names[parameter]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for part in ("weight", "bias"):
        assert lr[f"head.{part}"] == pytest.approx(10 * lr[f"patch_embed.proj.{part}"])
