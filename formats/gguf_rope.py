"""How GGUF files say that rotary frequencies are scaled: as hyperparameters, or as a tensor.

`linear` scaling is llama.rope.scaling.type and .factor. `llama3` scaling is the tensor
rope_freqs.weight, F32 [K/2]: what each frequency is divided by. A file does not say of which
original context and factors that was computed; llama.cpp's converter takes LLaMA-3.1's for all, so
they are tried, and a tensor of other numbers is refused.
"""

import pathlib
from typing import Any

import torch
from torch import Tensor

from cli.errors import UserError
from formats.files import checked_scaling
from llama import LLAMA3_SCALING, LlamaConfig, scale_frequencies

ROPE_FREQS = "rope_freqs.weight"


def linear_scaling(path: pathlib.Path, given: dict) -> dict | None:
    """A LlamaConfig's rope_scaling of `given`, the hyperparameters, from which it takes its keys.

    As in llama.cpp, a factor alone is linear, and an old file calls it rope.scale_linear. Raises
    UserError for another type, and for a factor that is missing or not sensible.
    """
    kind = given.pop("rope.scaling.type", None)
    factor = given.pop("rope.scale_linear", None)
    factor = given.pop("rope.scaling.factor", factor)
    if kind == "none" or (kind is None and factor in (None, 1)):
        return None
    if kind not in (None, "linear"):
        raise UserError(f"{path}: llama.rope.scaling.type = {kind} is not supported")
    scaling = {"rope_type": "linear", "factor": factor}
    return checked_scaling(path, "llama.rope.scaling", scaling)


def llama3_scaling(path: pathlib.Path, tensor: Any, config: LlamaConfig) -> dict:
    """The rope_scaling that the tensor rope_freqs.weight was computed of.

    Raises UserError unless it is LLaMA-3.1's with some factor, its largest entry.
    """
    wanted = config.head_dim // 2
    if tensor.tensor_type.name != "F32" or tensor.shape.tolist() != [wanted]:
        raise UserError(
            f"{path}: {ROPE_FREQS} is {tensor.tensor_type.name} of shape {tensor.shape.tolist()}, "
            f"not F32 of [{wanted}]"
        )
    found = torch.from_numpy(tensor.data.copy())
    scaling = {**LLAMA3_SCALING, "factor": found.max().item()}
    # float32 frequencies move an entry by some 1e-7 times the factor
    known = divisors(config, scaling).allclose(found, rtol=1e-4, atol=0)
    if not (known and found.isfinite().all()):
        raise UserError(
            f"{path}: {ROPE_FREQS} is not supported; only the numbers of LLaMA-3.1's rope scaling "
            "are, for an original context of 8192"
        )
    if config.rope_scaling:
        raise UserError(f"{path}: {ROPE_FREQS} beside llama.rope.scaling is not supported")
    return scaling


def divisors(config: LlamaConfig, scaling: dict) -> Tensor:
    """What `scaling` divides each rotary frequency by, float32 [K/2]."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    frequencies = config.rope_theta ** -(pairs / config.head_dim)
    return (frequencies / scale_frequencies(frequencies, scaling)).float()
