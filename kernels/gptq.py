"""Two steps of GPTQ with few launches on a GPU, and in a CPU's cache.

Calling a small kernel takes longer than its work, on a GPU above all.
"""

import torch
from torch import Tensor

IN_CACHE = 2**15  # floats: 128 kB, and the most that PyTorch leaves to one thread


def gram(x_NI: Tensor) -> Tensor:
    """x^T x in float32, [I, I]."""
    if x_NI.is_cuda and x_NI.itemsize == 2:  # products of 16-bit floats are exact in float32
        return torch.mm(x_NI.t(), x_NI, out_dtype=torch.float32)
    x = x_NI.float()
    return x.t() @ x


def best_trial(
    x_gO: Tensor, importance_g: Tensor, trials_T2O: Tensor, bits: int, cut: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    """(cut [2, O], its error [O]): the best of T trials and of those before.

    A trial says how much of the range from 0 to 1 to cut below and above. On a CPU as many are
    tried at once as fit into its cache.
    """
    below, above = trials_T2O.unbind(1)  # [T, O] each
    step = (1 - below - above) / (2**bits - 1)
    shift, stretch = -below / step, 1 / step
    at_once = len(step) if x_gO.is_cuda else max(1, IN_CACHE // x_gO.numel())
    errors = []
    for start in range(0, len(step), at_once):
        some = slice(start, start + at_once)
        exact = torch.addcmul(shift[some], x_gO.unsqueeze(1), stretch[some])  # [g, ., O]
        codes = exact.round().clamp_(0, 2**bits - 1)
        torch.ops.aten.mse_loss.out(codes, exact, 0, out=codes)  # (codes - exact)^2 in one pass
        errors.append(torch.mv(codes.flatten(1).t(), importance_g).view_as(step[some]))
    errors = torch.cat((least.unsqueeze(0), torch.cat(errors).mul_(step.square())))  # [T + 1, O]
    least = errors.amin(dim=0)
    # As errors.argmin(dim=0), which takes five times as long on a CPU; where all are NaN, the last
    order = torch.arange(len(errors), device=errors.device, dtype=errors.dtype).unsqueeze(1)
    found = torch.where(errors == least, order, len(step)).amin(dim=0).long()
    cuts = torch.cat((cut.unsqueeze(0), trials_T2O))
    return cuts.gather(0, found.expand(1, 2, -1))[0], least
