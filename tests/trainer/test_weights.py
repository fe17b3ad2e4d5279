import pytest
import torch

from fractalshards.errors import FractalError
from fractaltrain.models import create_model, load_backbone


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_everything_but_the_head_is_loaded(name):
    before, after = create_model(name, 20, 32), create_model(name, 10, 32)
    torch.nn.init.ones_(next(before.parameters()))
    heads = [key for key in after.state_dict() if key.startswith(("head.", "fc."))]
    fresh = {key: after.state_dict()[key].clone() for key in heads}
    report = load_backbone(after, before.state_dict(), "runs/x")
    for key, tensor in after.state_dict().items():
        assert torch.equal(tensor, fresh[key] if key in heads else before.state_dict()[key]), key
    assert set(report.loaded) == set(after.state_dict()) - set(heads)
    assert list(report.new) == list(report.left) == heads
    assert str(report).endswith(f"not loaded: {', '.join(heads)}; new: {', '.join(heads)}")


def test_weights_of_another_model():
    with pytest.raises(FractalError, match=r"^runs/x: weights of another model \(.*\); check --weights$"):
        load_backbone(create_model("resnet10t", 10, 32), create_model("resnet18", 10, 32).state_dict(), "runs/x")


def test_weights_of_another_image_size():
    weights = create_model("vit_tiny_patch16_224", 10, 64).state_dict()
    with pytest.raises(FractalError, match=r"pos_embed have another shape here; fine-tune at .* --image-size"):
        load_backbone(create_model("vit_tiny_patch16_224", 10, 32), weights, "runs/x")
