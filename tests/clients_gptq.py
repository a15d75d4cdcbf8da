"""Do we read what GPTQModel writes?

`check_clients.py` runs this; CI has no GPTQModel. First, layers that its TorchLinear packs from
random weights, scales and zeros, the zeros 0 and greatest among them, saved as folders of LLaMAs.
Then small models that GPTQModel quantizes and saves by itself. `formats` reads them, and
TorchLinear.dequantize_weight() is compared with the weight that we take from the folder. Theirs is
in float16: a scale times a whole number, rounded once. Ours is exact, so it is rounded to float16
here, and then must be equal. Logits are compared with GPTQModel's own, in float16 on a CPU.

It ends with status 1 where a weight differs, or logits by more than 1e-2 of their largest.
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one it does not start
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

with contextlib.redirect_stdout(io.StringIO()):
    import gptqmodel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import formats  # noqa: E402
from cli.errors import UserError  # noqa: E402
from llama import Llama, LlamaConfig, linears  # noqa: E402

CONFIG = LlamaConfig(100, 128, 256, 1, 4, 2, max_position_embeddings=64)
LIMIT = 1e-2
CPU = gptqmodel.BACKEND.GPTQ_TORCH
TORCH = dict(backend=CPU, register_buffers=True, bias=False, desc_act=False)
MODELS = {  # name: what QuantizeConfig gets
    "4 bits": dict(bits=4, group_size=32, sym=True),
    "4 bits, asymmetric": dict(bits=4, group_size=32, sym=False),
    "2 bits, asymmetric": dict(bits=2, group_size=32, sym=False),
    "3 bits, asymmetric, v2": dict(bits=3, group_size=64, sym=False, format="gptq_v2"),
    "2 bits, a whole row": dict(bits=2, group_size=-1, sym=False, act_group_aware=False),
    "4 bits, some 3 bits, some float": dict(
        bits=4,
        group_size=32,
        dynamic={r"+:.*\.0\.mlp\..*": {"bits": 3, "group_size": 64}, r"-:.*o_proj": {}},
    ),
    "4 bits, and the head": dict(bits=4, group_size=32, lm_head=True),
    "4 bits, desc_act": dict(bits=4, group_size=32, desc_act=True, act_group_aware=False),
}


# ---- layers that TorchLinear packs


def packed_layer(linear, bits, group_size, sym):
    """(a TorchLinear of random weights with zeros in v2's form, scales [O, G] and zeros [O, G])."""
    outputs, inputs = linear.weight.shape
    size = inputs if group_size == -1 else group_size
    layer = TorchLinear(bits, group_size, sym, in_features=inputs, out_features=outputs, **TORCH)
    scales = (0.01 + torch.rand(outputs, inputs // size) / 10).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if not sym:
        zeros.random_(0, 2**bits)
    codes = torch.randint(0, 2**bits, (outputs, inputs)).float()
    spread = zeros.repeat_interleave(size, dim=1), scales.repeat_interleave(size, dim=1)
    linear.weight.data = (codes - spread[0]) * spread[1]
    g_idx = torch.arange(inputs, dtype=torch.int32) // size
    try:
        layer.pack_block(linear, scales, zeros, g_idx)
    except ValueError:  # as its own pack_module does: outputs that do not fill a word
        layer.pack_original(linear, scales, zeros, g_idx)
    layer.qzero_format(format=2)
    return layer.eval()


def write_layers(folder, bits, group_size, sym, version):
    """A folder of layers that TorchLinear packed; returns {name: its own weight [O, I]}."""
    model, tensors, theirs = Llama(CONFIG), {}, {}
    config = gptqmodel.QuantizeConfig(bits=bits, group_size=group_size, sym=sym)
    named = linears(model)
    if bits != 3:  # 100 outputs; 3-bit codes come in blocks of 32
        named.append(("lm_head", model.lm_head))
    for name, linear in named:
        layer = packed_layer(linear, bits, group_size, sym)
        written = layer.dequantize_weight().t().contiguous()
        if version == 1:
            convert_gptq_v2_to_v1_format_module(layer, config)
        tensors |= {f"{name}.{part}": t.clone() for part, t in layer.state_dict().items()}
        if version == 1:
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer.clear_weight_cache()
        theirs[name] = layer.dequantize_weight().t().contiguous()
        assert torch.equal(theirs[name], written), "GPTQModel does not read what it wrote"
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") not in theirs:
            tensors[name] = p.detach().half()
    save_file(tensors, folder / "model.safetensors")
    method = {"quant_method": "gptq", "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    method |= {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": False}
    method["meta"] = {"quantizer": [f"gptqmodel:{importlib.metadata.version('gptqmodel')}"]}
    fields = dataclasses.asdict(CONFIG) | {"quantization_config": method}
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields))
    return theirs


def unequal(model, theirs):
    """How many weights differ, of the layers that GPTQModel has as well; all rounded to float16."""
    count = 0
    for name, weight in theirs.items():
        layer = model.get_submodule(name)
        ours = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight
        count += (ours.half() != weight).sum().item()
    return count


def compare_layers():
    """Prints a row for every kind of layer; returns how many kinds differ."""
    print("| format | bits | groups | zeros | layers | weights | unequal in float16 |")
    print("|---|---|---|---|---|---|---|")
    wrong = 0
    for version, bits, sym, size in itertools.product(
        (1, 2), (2, 3, 4), (True, False), (32, 64, 128, -1)
    ):
        torch.manual_seed(bits + size)
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(io.StringIO()):
                theirs = write_layers(pathlib.Path(folder), bits, size, sym, version)
            count = unequal(formats.load_model(folder, torch.float32), theirs)
        weights, kind = sum(w.numel() for w in theirs.values()), "equal" if sym else "any"
        print(f"| v{version} | {bits} | {size} | {kind} | {len(theirs)} | {weights} | {count} |")
        wrong += count > 0
    return wrong


# ---- models that GPTQModel quantizes


def write_float(folder):
    """A LLaMA of random weights, with a tokenizer that GPTQModel insists on."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{k: v for k, v in vars(CONFIG).items() if k != "rope_theta"} | {"num_hidden_layers": 2}
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    words = {f"t{i}": i for i in range(CONFIG.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", bos_token="t1", eos_token="t2"
    ).save_pretrained(folder)


def quantize(source, folder, settings):
    """GPTQModel's own folder of a model."""
    tokens = torch.randint(0, CONFIG.vocab_size, (32, 64)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    config = gptqmodel.QuantizeConfig(**{"desc_act": False, **settings})
    model = gptqmodel.GPTQModel.load(str(source), config, device="cpu")
    model.quantize(rows, batch_size=1, backend=CPU)
    model.save(str(folder))


def compare_model(folder, tokens):
    """(differing weights, relative error of the logits) of GPTQModel's model and ours."""
    load = gptqmodel.GPTQModel.load
    theirs = load(str(folder), device="cpu", backend=CPU, dtype=torch.float16).model.eval()
    weights = {}
    for name, module in theirs.named_modules():
        if isinstance(module, TorchLinear):
            weights[name] = module.dequantize_weight().t().contiguous()
    exact = formats.load_model(folder, torch.float32)
    with torch.inference_mode():
        expected = theirs(tokens).logits.double()
        actual = formats.load_model(folder, torch.float16)(tokens).double()
    error = (actual - expected).abs().max() / expected.abs().max()
    return unequal(exact, weights), error.item(), len(weights)


def compare_models(root):
    """Prints a row for every model; returns how many differ."""
    print("\n| GPTQModel's model | layers | unequal in float16 | logits differ by | as we see it |")
    print("|---|---|---|---|---|")
    wrong, source = 0, root / "float"
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 32))
    write_float(source)
    for name, settings in MODELS.items():
        folder = root / name.replace(" ", "-").replace(",", "")
        with contextlib.redirect_stdout(io.StringIO()):
            quantize(source, folder, settings)
        try:
            kind = json.dumps(formats.quantization_of(folder))[:70]
            with contextlib.redirect_stdout(io.StringIO()):
                count, error, layers = compare_model(folder, tokens)
        except UserError as e:
            refused = str(e).replace(str(folder), folder.name)
            print(f"| {name} | | | | refused: {refused} |")
            wrong += "desc_act" not in settings
            continue
        print(f"| {name} | {layers} | {count} | {error:.1e} | {kind} |")
        wrong += count > 0 or error > LIMIT
    return wrong


def main():
    for package in ("gptqmodel", "torch", "transformers"):
        print(f"{package} {importlib.metadata.version(package)}")
    print()
    wrong = compare_layers()
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):  # GPTQModel writes logs/
        wrong += compare_models(pathlib.Path(root))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
