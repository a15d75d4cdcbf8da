"""Files that llama.cpp's own quantizer made: in, tuned (the adapter is random), and out again.

`check_clients.py` runs this. Beside llama.cpp, which rounds activations to 8 bits on a CPU, stand
llama.cpp on the same weights as float32, and transformers on the file, which round nothing.
"""

import ctypes
import importlib.metadata
import pathlib
import shutil
import sys
import tempfile

from helpers_llamacpp import AsInFile, LlamaCpp, Ours, Transformers, relative_error  # isort: skip

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from check_llamacpp import dequantize_file, failures, report
from helpers_clients import MATERIAL, seed_texts

from export import export
from formats import import_base, load_tokenizer, quantization_of
from formats.gguf_blocks import IN_GROUPS
from llama import Llama, LlamaConfig
from merge import merge
from qalora import adapter_parameters, add_adapters
from quant import load_quantized, quantize_model, save_quantized

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15}  # LLAMA_FTYPE_MOSTLY_...
SHAPE = LlamaConfig(32000, 256, 768, 4, 4, 2, rms_norm_eps=1e-5)


def float_file(out):
    """A GGUF file of random float16 weights, for llama.cpp to quantize."""
    torch.manual_seed(0)
    model = Llama(SHAPE)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    folder = out / "float"
    folder.mkdir()
    save_quantized(quantize_model(model, 4, 32), folder)
    shutil.copyfile(MATERIAL / "llama-tokenizer.model", folder / "tokenizer.model")
    export(folder, out / "packed.gguf")
    dequantize_file(out / "packed.gguf", out / "float.gguf", np.float16)
    return out / "float.gguf"


def quantized_by_llamacpp(source, ftype, path):
    """`source` quantized by llama.cpp itself."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = ftype, 2
    options.allow_requantize = True
    files = bytes(source), bytes(path)
    assert llama_cpp.llama_model_quantize(*files, ctypes.byref(options)) == 0
    return path


def tensors_in(file):
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def check_types(out):
    """Every type: untouched byte for byte; tuned, the same codes; the clients' logits are ours."""
    source = float_file(out)
    tokenizer = load_tokenizer(MATERIAL / "llama-tokenizer.model")
    prompts = [[1, *tokenizer.encode(text)][:100] for text in seed_texts()[:3]]
    for name, ftype in TYPES.items():
        file = quantized_by_llamacpp(source, ftype, out / f"{name}.gguf")
        base = out / name
        base.mkdir()
        import_base(file, base)
        tokenizer.save(base)
        frozen = len(quantization_of(base).get("layers", {}))
        print(f"  {name}, {frozen} of {7 * SHAPE.num_hidden_layers} layers in other types")
        export(base, out / "same.gguf")
        same = (out / "same.gguf").read_bytes() == file.read_bytes()
        report("  written back untouched, byte for byte", "equal" if same else "different", same)
        model = add_adapters(load_quantized(base), 8, 16.0)
        for p in adapter_parameters(model).values():
            p.data.normal_(0, 0.03)
        save_quantized(merge(model), base)
        lines = export(base, out / "tuned.gguf")
        for line in lines[1:]:
            print(f"    {line}")
        before, after = tensors_in(file), tensors_in(out / "tuned.gguf")
        kinds = sorted({t.tensor_type.name for t in after.values()} - {"F32"})
        print(f"    its types now: {', '.join(kinds)}")
        rest = [n for n, t in before.items() if t.tensor_type.name not in IN_GROUPS]
        equal = sum(after[n].data.tobytes() == before[n].data.tobytes() for n in rest)
        report("  other tensors, equal bytes", f"{equal} of {len(rest)}", equal == len(rest))
        dequantize_file(out / "tuned.gguf", out / "float32.gguf", np.float32)
        ours, in_file = Ours(base), AsInFile(base, out / "tuned.gguf")
        exact = {"llama.cpp, weights as float32": LlamaCpp(out / "float32.gguf")}
        exact["transformers"] = Transformers(out / "tuned.gguf")
        for client, model in exact.items():
            errors = [relative_error(model.logits(p), in_file.logits(p)) for p in prompts]
            found = f"{max(errors):.1e} at most"
            report(f"  {client}", found, max(errors) < 1e-5)
        theirs = LlamaCpp(out / "tuned.gguf")
        errors = [relative_error(theirs.logits(p), ours.logits(p)) for p in prompts]
        found = f"{np.mean(errors):.2%} on average, {max(errors):.2%} at most"
        report("  llama.cpp, activations of 8 bits", found, max(errors) < 0.05)


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    packages = ("llama-cpp-python", "transformers", "gguf")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as out:
        check_types(pathlib.Path(out))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
