"""How the arithmetic is done: precision, memory layout, compilation, determinism. None of it changes what is learnt."""

import os
import shutil
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from fractalshards.errors import FractalError, UsageError
from fractaltrain.settings import Amp


def autocast_dtype(amp: Amp, device: torch.device) -> torch.dtype:
    """The precision of the forward pass; float32 means no autocast.

    Raises:
        UsageError: for float16 on a CPU, whose loss scaling nobody needs.
    """
    if amp == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; choose bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[amp]


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last for convolutional networks on GPUs, whose tensor cores read it; contiguous otherwise.

    A network is convolutional if it has more than one convolution: a ViT's only one cuts the image into patches.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return torch.channels_last if device.type == "cuda" and convolutions > 1 else torch.contiguous_format


def set_determinism(deterministic: bool) -> None:
    """Let the same run give the same bits on the same hardware, or let cuDNN try out which algorithms are fastest."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first matrix product on a GPU
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms whose statistics are those of all processes together; names and parameters stay.

    Raises:
        UsageError: on a CPU, where torch has none.
    """
    if device.type != "cuda":
        raise UsageError("--sync-batchnorm needs GPUs; drop it")
    synchronised_model: nn.Module = convert_sync_batchnorm(model)  # timm's own batch norms, too
    return synchronised_model


def with_gradients_laid_out(model: nn.Module) -> nn.Module:
    """The model, of which gradients have the strides of their parameters, as DDP wants them.

    Where a dimension has a single entry its stride means nothing, and autograd leaves whatever it found: the gradient
    of a class token is a piece of that of all tokens if there is a single image. DDP compares all strides, and warns.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_laid_out_as, parameter.stride()))  # type: ignore[no-untyped-call]
    return model


def _laid_out_as(wanted: Sequence[int], gradient: torch.Tensor) -> torch.Tensor:
    dimensions = zip(gradient.shape, gradient.stride(), wanted, strict=True)
    same = all(size == 1 or stride == other for size, stride, other in dimensions)
    return gradient.as_strided(gradient.shape, wanted) if same else gradient  # autograd itself mends the others


def compiled(network: nn.Module) -> nn.Module:
    """The same network through torch.compile, which works when it is called first.

    Raises:
        FractalError: if this machine has no C++ compiler, which torch needs then.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise FractalError("--compile needs a C++ compiler; install g++, load a module that has it, or drop --compile")
    network_like: nn.Module = torch.compile(network)  # type: ignore[assignment]  # it behaves like one
    return network_like
