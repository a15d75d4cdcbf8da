"""Two steps of GPTQ with few launches on a GPU, the second in a CPU's cache.

Calling a small kernel takes longer than its work, on a GPU above all.
"""

import torch
from torch import Tensor

IN_CACHE = 2**17  # floats: 512 kB, which the cores share


def gram(x_NI: Tensor) -> Tensor:
    """x^T x in float32, [I, I]."""
    if x_NI.is_cuda and x_NI.itemsize == 2:  # products of 16-bit floats are exact in float32
        return torch.mm(x_NI.t(), x_NI, out_dtype=torch.float32)
    x = x_NI.float()
    return x.t() @ x


def best_trial(
    x_gO: Tensor, importance_g: Tensor, trials_T2O: Tensor, bits: int, cut: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    """(cut [2, O], its error [O]): the best of T trials and of `cut`, whose error is `least`.

    A trial says how much of the range from 0 to 1 to cut below and above. On a CPU as many are
    tried at once as fit into its cache.
    """
    below, above = trials_T2O.unbind(1)  # [T, O] each
    step = (1 - below - above) / (2**bits - 1)
    shift, stretch = -below / step, 1 / step
    parts = 1 if x_gO.is_cuda else max(1, len(step) * x_gO.numel() // IN_CACHE)
    errors = []
    for shift_tO, stretch_tO in zip(shift.chunk(parts), stretch.chunk(parts), strict=True):
        exact = torch.addcmul(shift_tO, x_gO.unsqueeze(1), stretch_tO)  # [g, t, O]
        codes = exact.round().clamp_(0, 2**bits - 1)
        torch.ops.aten.mse_loss.out(codes, exact, 0, out=codes)  # (codes - exact)^2 in one pass
        errors.append(torch.mv(codes.flatten(1).t(), importance_g).view_as(shift_tO))
    errors = torch.cat((least.unsqueeze(0), torch.cat(errors).mul_(step.square())))  # [T + 1, O]
    least, found = errors.min(dim=0)
    cuts = torch.cat((cut.unsqueeze(0), trials_T2O))
    return cuts.gather(0, found.expand(1, 2, -1))[0], least
