"""Parameter groups and learning rate schedules, against values computed by hand."""

from dataclasses import replace
from math import cos, pi

import pytest
import torch
from torch import nn

from fractalshards.errors import UsageError
from fractaltrain.models import create_model, freeze_backbone
from fractaltrain.optim import Rates, build_optimizer, build_schedule, parameter_rates
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES


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


def test_optimizer_leaves_out_what_is_frozen():
    model = create_model("resnet10t", 3, 32)
    freeze_backbone(model)
    (group,) = build_optimizer(model, PT_RECIPES["kataoka"]).param_groups
    assert [parameter.shape for parameter in group["params"]] == [(3, 512), (3,)]


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


def test_cosine_schedule():
    """20 epochs of 10 steps: 5 of warm-up from 1e-6 towards 1e-3, then the rest of a cosine over all 200 steps."""
    rates, _ = rates_of(PT_RECIPES["deit"], 20, 10)
    assert rates[0] == pytest.approx(1e-6)
    assert rates[25] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[50] == pytest.approx(1e-5 + 9.9e-4 * (1 + cos(pi / 4)) / 2)
    assert rates[100] == pytest.approx(1e-5 + 9.9e-4 / 2)
    assert rates[199] == pytest.approx(1e-5 + 9.9e-4 * (1 + cos(pi * 199 / 200)) / 2)
    assert max(rates) == rates[49] == pytest.approx(1e-6 + 9.99e-4 * 49 / 50)


def test_cosine_schedule_with_warm_up_in_steps():
    """1p-frac: 15 steps from 5e-7 towards 5e-4, then a cosine to 5e-6; 240 epochs of 1,000 steps are too many here."""
    recipe = PT_RECIPES["onepfrac"]
    assert (recipe.epochs * 1000 * recipe.passes // recipe.batch_size) == 240_000
    rates, _ = rates_of(recipe, 4, 50)
    assert rates[0] == pytest.approx(5e-7)
    assert rates[3] == pytest.approx(5e-7 + (5e-4 - 5e-7) * 0.2)
    assert rates[100] == pytest.approx(5e-6 + (5e-4 - 5e-6) / 2)
    assert rates[199] == pytest.approx(5e-6 + (5e-4 - 5e-6) * (1 + cos(pi * 199 / 200)) / 2)
    assert rates.index(max(rates)) == 15
    with pytest.raises(UsageError, match="warmup_steps"):
        rates_of(recipe, 3, 5)


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
    assert [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups] == pytest.approx(
        [1, 1, 10, 10]
    )


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_one_cycle_schedule_of_very_short_runs(steps):
    """10 steps make torch's OneCycleLR divide by zero at pct_start 0.1."""
    rates, momenta = rates_of(FT_RECIPES["anderson"], 1, steps)
    assert all(0 < rate <= 0.15 + 1e-9 for rate in rates)
    assert all(0.85 <= momentum <= 0.95 for momentum in momenta)
    if steps > 1:
        assert rates[-1] == pytest.approx(0.15 / 25e4)


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
