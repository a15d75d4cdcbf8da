"""Two steps of GPTQ as a GPU wants them: with fewer launches, and on tensor cores.

A column of GPTQ is several small kernels, whose launches take longer than their work.
"""

import torch
from torch import Tensor


def gram(x_NI: Tensor) -> Tensor:
    """x^T x in float32, [I, I]."""
    if x_NI.is_cuda and x_NI.itemsize == 2:  # products of 16-bit floats are exact in float32
        return torch.mm(x_NI.t(), x_NI, out_dtype=torch.float32)
    x = x_NI.float()
    return x.t() @ x


def best_trial(
    x_gO: Tensor, importance_g: Tensor, trials_T2O: Tensor, bits: int, cut: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    """(cut [2, O], its error [O]): the best of T trials, tried at once, and of those before."""
    below, above = trials_T2O.unsqueeze(2).unbind(1)  # [T, 1, O] each
    step = (1 - below - above) / (2**bits - 1)
    exact = torch.addcmul(-below / step, x_gO, 1 / step)  # [T, g, O]
    error = exact.round().clamp_(0, 2**bits - 1).sub_(exact).square_()
    error = (importance_g @ error) * step.squeeze(1).square()  # [T, O]
    errors, found = torch.cat((least.unsqueeze(0), error)).min(dim=0)
    cuts = torch.cat((cut.unsqueeze(0), trials_T2O))
    return cuts.gather(0, found.expand(1, 2, -1))[0], errors
