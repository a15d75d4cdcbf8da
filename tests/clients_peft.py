"""Does a QA-LoRA adapter of PEFT, merged here, compute what PEFT computes?

`check_clients.py` runs this; CI has neither, and compares with PEFT's formula in
test_formats_peft.py. A small LLaMA of transformers gets GPTQ layers, packed by gptqmodel. PEFT puts
a QA-LoRA adapter over them and saves it; A and B are random. Here the same layers are a quantized
model, and the adapter is read from PEFT's folder and merged. Compared are every adapted layer's
output and the logits, in float32: the largest error as a part of the largest magnitude. It ends
with status 1 above 1e-5.
"""

import contextlib
import importlib.metadata
import io
import os
import pathlib
import random
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

with contextlib.redirect_stdout(io.StringIO()):  # its banner
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from formats.huggingface import parameter_shapes, read_config  # noqa: E402
from formats.peft import load_adapter, save_merged  # noqa: E402
from formats.quantized import load_quantized, save_quantized  # noqa: E402
from llama import LINEARS, Llama, linears  # noqa: E402
from merge import merge  # noqa: E402
from quant import Quantized, QuantLinear  # noqa: E402
from text.tokenizer import train_tokenizer  # noqa: E402

LIMIT = 1e-5
SHAPE = dict(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CASES = [  # (bits, the base's group size, fields of LoraConfig)
    (4, 32, dict(qalora_group_size=32)),
    (4, 16, dict(qalora_group_size=32, r=3, lora_alpha=5)),
    (4, 16, dict(qalora_group_size=64, use_rslora=True, r=6)),
    (2, 16, dict(qalora_group_size=16, use_rslora=True, lora_alpha=1)),
    (4, 128, dict(qalora_group_size=128, rank_pattern={"q_proj": 2, r".*\.1\.mlp\..*": 5})),
    (
        4,
        32,
        dict(
            qalora_group_size=64,
            rank_pattern={"model.layers.0.mlp.up_proj": 1, "layers.1": 2, "k_proj|v_proj": 7},
            alpha_pattern={r"self_attn\.\w+": 3, "down_proj": 9},
            use_rslora=True,
        ),
    ),
    (4, 32, dict(qalora_group_size=32, target_modules=r".*\.1\..*(q|down)_proj")),
    (4, 32, dict(qalora_group_size=32, target_modules=["v_proj"], layers_to_transform=[0])),
]


def gptq_layer(inputs, outputs, bits, group_size):
    """(a layer packed by gptqmodel, the same as a Quantized): random codes, scales and zeros."""
    groups = torch.arange(inputs) // group_size
    codes = torch.randint(2**bits, (outputs, inputs))
    zeros = torch.randint(1, 2**bits, (outputs, inputs // group_size))
    scale = ((1 + torch.rand(zeros.shape)) / 2**bits / inputs**0.5).half()
    dense = torch.nn.Linear(inputs, outputs, bias=False)
    dense.weight.data = scale.float()[:, groups] * (codes - zeros[:, groups])
    layer = TorchLinear(bits, group_size, True, False, inputs, outputs, register_buffers=True)
    layer.pack_original(dense, scale.float(), zeros.float(), groups.int())
    layer.scales = layer.scales.float()  # so that it dequantizes in float32
    return layer.eval(), Quantized(codes.to(torch.uint8), scale, -scale.float() * zeros)


def models(folder, bits, group_size):
    """(transformers' model with GPTQ layers, ours with the same numbers)."""
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    theirs.config.save_pretrained(folder)
    ours = Llama(read_config(folder))
    stored = theirs.state_dict()
    ours.load_state_dict({name: stored[name] for name in parameter_shapes(ours.config)})
    for name, layer in linears(ours):
        shape = layer.in_features, layer.out_features
        packed, quantized = gptq_layer(*shape, bits, group_size)
        theirs.set_submodule(name, packed)
        ours.set_submodule(name, QuantLinear.from_quantized(quantized, bits))
    return theirs, ours.requires_grad_(False)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def compare(folder, bits, group_size, fields):
    """(adapted layers, the largest error of a layer's output, of the logits)."""
    theirs, ours = models(folder, bits, group_size)
    save_quantized(ours, folder / "base")
    train_tokenizer(["any text will do"], folder / "base" / "tokenizer.model", 280)
    chosen = {"target_modules": list(LINEARS)} | fields
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(use_qalora=True, **chosen))
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapted.save_pretrained(folder / "adapter")
    adapted.eval()

    save_merged(folder / "base", folder / "adapter", folder / "merged")
    merged = load_quantized(folder / "merged")
    beside = load_adapter(load_quantized(folder / "base"), folder / "adapter")
    tokens = torch.randint(300, (2, 40))
    assert torch.equal(beside(tokens), merged(tokens)), "adapted and merged differ"
    assert all(torch.equal(a, b) for a, b in zip(state(merge(beside)), state(merged), strict=True))
    errors = []
    for name, layer in linears(merged):
        module = theirs.get_submodule(name)
        if hasattr(module, "lora_A"):
            x = torch.randn(2, 5, layer.in_features)
            moved = relative_error(layer(x), ours.get_submodule(name)(x))
            assert moved > 100 * LIMIT, f"the adapter of {name} moves it by {moved} only"
            errors.append(relative_error(layer(x), module(x)))
    return len(errors), max(errors), relative_error(merged(tokens), adapted(tokens).logits)


def state(model):
    return [tensor for _, tensor in sorted(model.state_dict().items())]


def main():
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("peft", "gptqmodel", "torch")]
    print(", ".join(versions) + "\n")
    print(f"{'bits':>4} {'group':>5} {'layers':>6} {'output':>8} {'logits':>8}  adapter")
    torch.manual_seed(0)
    chance = random.Random(0)
    for _ in range(8):  # any others
        group_size = chance.choice([16, 32, 64])
        size = group_size * chance.choice([k for k in (1, 2, 4) if k * group_size <= 128])
        fields = dict(qalora_group_size=size, r=chance.randint(1, 16))
        fields |= dict(lora_alpha=chance.randint(1, 32), use_rslora=chance.random() < 0.5)
        CASES.append((chance.choice([2, 3, 4]), group_size, fields))
    worst = 0
    for bits, group_size, fields in CASES:
        with tempfile.TemporaryDirectory() as folder:
            layers, output, logits = compare(pathlib.Path(folder), bits, group_size, fields)
        worst = max(worst, output, logits)
        written = ", ".join(f"{name}={value}" for name, value in fields.items())
        print(f"{bits:4} {group_size:5} {layers:6} {output:8.1e} {logits:8.1e}  {written}")
    print(f"\nlargest error {worst:.1e}, limit {LIMIT:.0e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
