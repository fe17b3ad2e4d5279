import pytest
import torch
import torchvision

from fractalshards.errors import FractalError, UsageError
from fractaltrain.models import create_model, head_names


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet50_is_torchvisions():
    model = create_model("resnet50", 1000, 224)
    assert isinstance(model, torchvision.models.ResNet)
    assert parameters(model) == 25_557_032  # as torchvision documents it


def test_deit_small_has_the_published_size():
    assert parameters(create_model("deit_small_patch16_224", 1000, 224)) == 22_050_664  # 22 M in Touvron et al. 2021


def test_deit_small_with_larger_patches():
    """Against DeiT-S: (32^2 - 16^2) * 3 more weights per channel of the patch embedding, 196 - 49 fewer positions."""
    expected = 22_050_664 + 384 * 3 * (32**2 - 16**2) - 384 * (196 - 49)
    assert parameters(create_model("deit_small_patch32_224", 1000, 224)) == expected


@pytest.mark.parametrize("name", ["resnet50", "resnet10t", "vit_tiny_patch16_224", "deit_small_patch32_224"])
def test_models_see_other_sizes(name):
    model = create_model(name, 7, 64).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("resnet50", ("fc",)),
        ("resnet10t", ("fc",)),
        ("vit_tiny_patch16_224", ("head",)),
        ("deit_small_patch32_224", ("head",)),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("convnext_atto", ("head.fc",)),
    ],
)
def test_head_names(name, heads):
    assert head_names(create_model(name, 7, 224)) == heads


def test_starting_weights_follow_the_seed():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return create_model("vit_tiny_patch16_224", 7, 32).get_parameter("head.weight")

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_unknown_model_suggests_close_ones():
    with pytest.raises(
        FractalError, match=r"^no model 'deit_smal_patch32_224'; did you mean deit_small_patch32_224 or"
    ):
        create_model("deit_smal_patch32_224", 10, 224)
    with pytest.raises(FractalError, match=r"^no model 'qqqqq'; timm.list_models\(\) names them all$"):
        create_model("qqqqq", 10, 224)


@pytest.mark.parametrize("name", ["resnet50", "vgg11"])
def test_model_without_drop_path(name):
    with pytest.raises(
        UsageError, match=f"^{name} has no drop path, which the recipe asks for; add --set drop_path=0$"
    ):
        create_model(name, 3, 32, drop_path=0.1)
