"""QA-LoRA (Xu et al., ICLR 2024): low-rank adapters that live on the quantizer's groups.

LoRA adds s * B @ A @ x to a layer, with A as wide as the input. QA-LoRA lets A see only the sum of
x over each group of the quantizer, so all that the adapter can do is move each group's offset, by
s * B @ A. The layer below computes that offset and multiplies by it; merging keeps it: the same
numbers in the same operations, so the same bits.

Dimension key: O outputs, I inputs, G groups, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from baselines import LoRALinear, factors
from cli.errors import UserError
from llama import LINEARS, linears
from quant import QuantLinear, quant_matmul


class QALoRALinear(nn.Module):
    """A packed linear layer with a trainable low-rank change of its offsets.

    y = x @ (scale * codes + offset + s * B @ A)^T
      = x @ (scale * codes + offset)^T + s * pool(x) @ A^T @ B^T
    with pool(x)[p] the sum of x over group p, lora_A [R, G], lora_B [O, R], s = alpha / rank:
    algorithm 1 and section 3.3 of the paper. At rank "full", which the paper has not, there is
    neither A nor s: lora_B [O, G] is added to the offsets.
    """

    def __init__(self, base: QuantLinear, rank: int | str, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        if rank == "full":
            self.lora_A, self.lora_B = None, nn.Parameter(torch.zeros_like(base.offset))
        else:
            self.scaling = alpha / rank
            self.lora_A, self.lora_B = factors(*base.offset.shape, rank, base.offset.device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        base = self.base
        return quant_matmul(x, base.packed, base.scale, self.effective_offset(), base.bits)

    def effective_offset(self) -> Tensor:
        """offset + s * B @ A (or + B), float32 [O, G]. The forward pass and the merge call this."""
        offset, b = self.base.offset, self.lora_B.float()  # .to(bfloat16) casts parameters, too
        if self.lora_A is None:
            return offset + b
        with torch.autocast(offset.device.type, enabled=False):
            return torch.addmm(offset, b, self.lora_A.float(), alpha=self.scaling)

    @torch.no_grad()
    def merged(self) -> QuantLinear:
        """The base layer, changed in place: the effective offset replaces its own."""
        self.base.offset = self.effective_offset()
        return self.base


def add_adapters(
    model: nn.Module, rank: int | str, alpha: float, targets: Sequence[str] = LINEARS
) -> nn.Module:
    """Freezes `model` and adapts its linear layers named in `targets`, in place; returns the model.

    A QuantLinear becomes a QALoRALinear, and where a model has some, its other layers stay frozen.
    Where it has none, a float or NF4 linear becomes a LoRALinear, the baseline. Raises UserError as
    `check_targets` does, where no layer can be adapted, and for a baseline of full rank.
    """
    check_targets(targets)
    model.requires_grad_(False)
    in_groups = any(isinstance(layer, QuantLinear) for _, layer in linears(model))
    if rank == "full" and not in_groups:
        raise UserError("full rank is for layers that are quantized in groups; there are none here")
    kind, adapted = (QuantLinear, QALoRALinear) if in_groups else (nn.Module, LoRALinear)
    found = [(path, layer) for path, layer in linears(model, targets) if isinstance(layer, kind)]
    if not found:
        raise UserError(f"--targets {','.join(targets)}: none of them is quantized in groups here")
    for path, layer in found:
        model.set_submodule(path, adapted(layer, rank, alpha))
    return model


def check_targets(targets: Sequence[str]) -> None:
    """Raises UserError for a name that is none of the seven linear layers of a block."""
    for name in targets:
        if name not in LINEARS:
            raise UserError(f"--targets names {name!r}; a block's are {', '.join(LINEARS)}")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters: {"model.layers.0.self_attn.q_proj.lora_A": parameter, ...}."""
    ends = ("lora_A", "lora_B")
    return {name: p for name, p in model.named_parameters() if name.endswith(ends)}
