"""QA-LoRA (Xu et al., ICLR 2024): low-rank adapters that live on the quantizer's groups, and the LoRA baseline.

LoRA adds s * B @ A @ x to a layer, with A as wide as the input. QA-LoRA lets A see only the sum of x over each group
of the quantizer, so that all the adapter can do is move each group's offset by s * B @ A. The layer below computes
that moved offset and multiplies by it; merging keeps it. Both use the same numbers in the same operations, so the
merged model returns the same bits.
"""

import json
import math
import pathlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cli import UserError, written_whole
from llama import LINEARS, linears, read_json
from quant import QuantLinear, quant_matmul


class QALoRALinear(nn.Module):
    """A packed linear layer with a trainable low-rank change of its offsets.

    y = x @ (scale * codes + offset + s * B @ A, per group)ᵀ
      = x @ (scale * codes + offset)ᵀ + s * pool(x) @ Aᵀ @ Bᵀ      pool(x)[p] = the sum of x over group p
    with lora_A [R, G], lora_B [O, R], s = alpha / rank: equation 2 and algorithm 1 of the paper.
    """

    def __init__(self, base: QuantLinear, rank, alpha):
        super().__init__()
        out_features, groups = base.scale.shape
        self.base, self.rank, self.alpha, self.scaling = base, rank, alpha, alpha / rank
        self.lora_A, self.lora_B = _adapter(rank, groups, out_features, base.offset.device)

    def effective_offset(self):
        """offset + s * B @ A, float32 [O, G]. The forward pass and the merge both take it from here."""
        with torch.autocast(self.lora_A.device.type, enabled=False):  # one kernel, not three
            return torch.addmm(self.base.offset, self.lora_B.float(), self.lora_A.float(), alpha=self.scaling)

    def forward(self, x):  # [..., I] -> [..., O]
        base = self.base
        return quant_matmul(x, base.packed, base.scale, self.effective_offset(), base.bits)

    @torch.no_grad()
    def merged(self):
        """The base layer, its offsets replaced by the effective ones."""
        self.base.offset = self.effective_offset()
        return self.base


class LoRALinear(nn.Module):
    """LoRA (Hu et al., 2021), the baseline: y = base(x) + s * x @ Aᵀ @ Bᵀ, with lora_A [R, I], lora_B [O, R].

    base: an nn.Linear without bias; or an NF4Linear, which makes it QLoRA.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha, self.scaling = base, rank, alpha, alpha / rank
        device = next(iter(base.state_dict().values())).device  # an NF4Linear has no parameter
        self.lora_A, self.lora_B = _adapter(rank, base.in_features, base.out_features, device)

    def forward(self, x):  # [..., I] -> [..., O]
        low_rank = x.to(self.lora_A.dtype) @ self.lora_A.t() @ self.lora_B.t()
        return self.base(x) + (self.scaling * low_rank).to(x.dtype)

    @torch.no_grad()
    def merged(self):
        """An nn.Linear whose weight is W + s * B @ A: float32 where W was NF4, as its 16 values cannot hold a sum."""
        weight = self.base.weight
        with torch.device("meta"):
            layer = nn.Linear(self.base.in_features, self.base.out_features, bias=False)
        layer.weight = nn.Parameter((weight + self.scaling * self.lora_B @ self.lora_A).to(weight.dtype), False)
        return layer


def _adapter(rank, in_features, out_features, device):  # A random, B zero: at first the adapter changes nothing
    a = torch.empty(rank, in_features, dtype=torch.float32)  # drawn on the CPU: a seed gives the same start everywhere
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return nn.Parameter(a.to(device)), nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))


def add_adapters(model, rank, alpha, targets=LINEARS):
    """Freezes `model` and replaces its linear layers named in `targets` by adapted ones, in place; returns the model.

    A QuantLinear becomes a QALoRALinear, a float linear a LoRALinear. Raises UserError as in `check_targets`.
    """
    check_targets(targets)
    model.requires_grad_(False)
    for path, layer in linears(model, targets):
        adapted = QALoRALinear if isinstance(layer, QuantLinear) else LoRALinear
        model.set_submodule(path, adapted(layer, rank, alpha))
    return model


def check_targets(targets):
    """Raises UserError for a name that is none of the seven linears of a block."""
    for name in targets:
        if name not in LINEARS:
            raise UserError(f"--targets names {name!r}; the linear layers of a block are {', '.join(LINEARS)}")


def adapter_parameters(model):
    """The trainable parameters by name, {"model.layers.0.self_attn.q_proj.lora_A": parameter, ...}."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("lora_A", "lora_B")}


def save_adapter(model, folder, **origin):
    """Writes adapter.safetensors and adapter.json (rank, alpha, targets and what `origin` adds) into a new folder."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (QALoRALinear, LoRALinear))}
    first = next(iter(layers.values()))
    targets = sorted({name.rpartition(".")[2] for name in layers}, key=LINEARS.index)
    settings = {"rank": first.rank, "alpha": first.alpha, "targets": targets, **origin}
    with written_whole(folder) as beside:
        beside.mkdir()
        tensors = {name: p.detach().cpu().contiguous() for name, p in adapter_parameters(model).items()}
        save_file(tensors, beside / "adapter.safetensors")
        (beside / "adapter.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_adapter(model, folder):
    """Adds the adapters kept in `folder` to `model`; returns what adapter.json says.

    Raises UserError when that is missing or describes no adapter, and as in `restore_adapter`.
    """
    path = pathlib.Path(folder) / "adapter.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; train the adapter again")
    settings = read_json(path)
    rank, alpha, targets = (settings.get(name) for name in ("rank", "alpha", "targets"))
    if not (type(rank) is int and rank > 0 and type(alpha) in (int, float) and 0 < alpha < math.inf
            and type(targets) is list and all(name in LINEARS for name in targets)):
        raise UserError(f"{path}: rank {rank}, alpha {alpha}, targets {targets} are no adapter's; train it again")
    add_adapters(model, rank, alpha, targets)
    restore_adapter(model, folder)
    return settings


def restore_adapter(model, folder):
    """Copies the tensors of a folder's adapter.safetensors into the adapters that `model` already has.

    Raises UserError when the file is missing or damaged, or a tensor does not fit: an adapter trained over other
    groups has no meaning here.
    """
    path, parameters = pathlib.Path(folder) / "adapter.safetensors", adapter_parameters(model)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing or damaged ({e}); train the adapter again") from e
    for name in sorted(parameters.keys() | tensors.keys()):
        wanted, found = ([*t[name].shape] if name in t else None for t in (parameters, tensors))
        if wanted != found:
            raise UserError(f"{path}: {name} is {found or 'missing'} where the model needs {wanted or 'none'}; it "
                            "belongs to a model with other layers or another group size")
        parameters[name].data.copy_(tensors[name])
