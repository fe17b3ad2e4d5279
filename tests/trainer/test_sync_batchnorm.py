"""``--sync-batchnorm``: what becomes of a model, and where it is refused. That it works takes GPUs."""

import timm
import torch
from torch import nn

from fractaltrain.train import synchronised


def test_every_batch_norm_is_replaced_and_the_weights_stay_where_they_were():
    model = timm.create_model("efficientnet_b0", num_classes=3)  # its batch norms have an activation of their own
    parameters, names = list(model.parameters()), list(model.state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model = synchronised(model, torch.device("cuda"))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == norms > 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_a_cpu_is_refused_in_one_line(fractaltrain, dataset, tmp_path):
    outcome = fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", "--batch-size", 10, "--sync-batchnorm",
                           "--out", tmp_path / "run")  # fmt: skip
    assert (outcome.code, outcome.err) == (2, "error: --sync-batchnorm needs GPUs; drop it\n")
    assert not (tmp_path / "run").exists()
