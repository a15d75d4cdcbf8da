"""Do real clients agree with us on an exported file? llama.cpp and transformers load it and are compared.

    pip install gguf transformers llama-cpp-python          (the last compiles llama.cpp: about 10 minutes on 2 cores)
    python train.py                                         (makes runs/tiny)
    python tests/check_llamacpp.py runs/tiny | tee results/llamacpp.txt

A person runs this; CI has no llama.cpp and reads files back in test_export.py. It ends with status 1 where a check
failed. transformers computes in float32. llama.cpp rounds activations to 8 bits where the weights are Q4_1, which moves
logits by 1 to 3 % and decides a greedy text where two tokens are almost equally likely. That nothing else does is seen
when it gets the very same weights, of the same file, as float32: then it says what we say.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import pathlib
import struct
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import llama_cpp
import numpy as np
import torch
import transformers

import data
import export
from llama import Llama, LlamaConfig, generate, load_pretrained
from merge import load_model, merge
from qalora import adapter_parameters, add_adapters
from quant import load_quantized, quantize_model, save_quantized

MATERIAL = ROOT.parent / "shared" / "data"
NEW_TOKENS = 60
failures = []


def report(what, found, good):
    """Prints one result and remembers a bad one."""
    print(f"  {what:42} {found}{'' if good else '   <-- FAILED'}", flush=True)
    if not good:
        failures.append(what)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# ---- the clients

class LlamaCpp:
    """llama.cpp with a file loaded."""

    def __init__(self, file):
        self.model = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, n_threads=2, verbose=False,
                                     type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)

    def tokenize(self, text):
        return self.model.tokenize(text.encode(), add_bos=False, special=False)

    def logits(self, tokens):  # [T, V]
        self.model.reset()
        self.model.eval(tokens)
        return torch.from_numpy(self.model.scores[:len(tokens)].copy())

    def greedy(self, tokens, eos):
        said = [self.logits(tokens)[-1].argmax().item()]
        while len(said) < NEW_TOKENS and said[-1] != eos:
            self.model.eval(said[-1:])
            said.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
        return said


class Transformers:
    """transformers with a file loaded, which it dequantizes."""

    def __init__(self, file):
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(file.parent, gguf_file=file.name, dtype=torch.float32)

    @torch.no_grad()
    def logits(self, tokens):
        return self.model(torch.tensor([tokens])).logits[0]

    def greedy(self, tokens, eos):
        said = self.model.generate(torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False,
                                   eos_token_id=eos, pad_token_id=eos)
        return said[0, len(tokens):].tolist()


class Ours:
    """The folder that was exported."""

    def __init__(self, folder):
        self.model = load_model(folder).float()

    @torch.no_grad()
    def logits(self, tokens):
        return self.model(torch.tensor([tokens]))[0]

    def greedy(self, tokens, eos):
        return generate(self.model, torch.tensor([tokens]), NEW_TOKENS, eos_token_id=eos)[0, len(tokens):].tolist()


def compare(folder, file, prompts, texts, greedy=True):
    """Compares what both clients say of `file` with what we say of `folder`: tokens of texts, logits, greedy text."""
    tokenizer, ours, llamacpp = data.load_tokenizer(folder), Ours(folder), LlamaCpp(file)
    equal = sum(llamacpp.tokenize(text) == tokenizer.encode(text) for text in texts)
    report("llama.cpp: texts with equal tokens", f"{equal} of {len(texts)}", equal == len(texts))
    as_float32 = file.with_name(f"{file.stem}-float32.gguf")
    dequantize_file(file, as_float32, np.float32)
    for name, client, limit in (("llama.cpp", llamacpp, 0.03), ("llama.cpp, weights as float32", LlamaCpp(as_float32), 0.003),
                                ("transformers", Transformers(file), 0.003)):
        errors = [relative_error(client.logits(p), ours.logits(p)) for p in prompts]
        print(f"  {name}")
        report("  relative error of logits", f"{np.mean(errors):.2%} on average, {max(errors):.2%} at most",
               max(errors) < limit)
        if greedy:
            compare_greedy(client, ours, prompts, tokenizer.eos_id(), may_part=client is llamacpp)
    if greedy:
        print(f"  such as: {tokenizer.decode(ours.greedy(prompts[0], tokenizer.eos_id()))!r}")


def compare_greedy(client, ours, prompts, eos, may_part):
    """Greedy texts are equal; or, where they may, part where our two likeliest tokens are closer than the rounding."""
    parted = []
    for prompt in prompts:
        theirs, mine = client.greedy(prompt, eos), ours.greedy(prompt, eos)
        if theirs != mine:
            n = next(n for n, (a, b) in enumerate(zip(theirs, mine)) if a != b)
            expected = ours.logits(prompt + mine[:n])[-1]
            rounding = (client.logits(prompt + mine[:n])[-1] - expected).abs().max().item()
            parted.append(((expected[mine[n]] - expected[theirs[n]]).item(), 2 * rounding, n))
    told = "".join(f"; one parts at token {n}, two logits {gap:.3f} apart (rounding moves them by {rounding:.3f})"
                   for gap, rounding, n in parted)
    report("  prompts with equal greedy text", f"{len(prompts) - len(parted)} of {len(prompts)}{told}",
           not parted or (may_part and all(gap <= rounding for gap, rounding, _ in parted)))


# ---- what is compared

def check_run(run, out):
    """A fine-tuned run, exported as it is."""
    print(f"\nthe run {run.name}: fine-tuned, merged, exported")
    tokenizer, world = data.load_tokenizer(run), data.make_world()
    print("  " + "; ".join(export.export(run, out / "run.gguf")).replace(f"{out}/", ""))
    records = [*world.train, *world.test]
    prompts = [[1, *tokenizer.encode(r.prompt)] for r in world.test[:20]]
    compare(run, out / "run.gguf", prompts, [part for r in records for part in r])


def check_stories(out):
    """stories260K, whose feed-forward width of 172 is filled up with zeros to 192: the same function."""
    print("\nstories260K (feed-forward 172 filled up to 192), quantized to 4 bits in groups of 32 by RTN")
    source = load_pretrained(MATERIAL / "stories260K", torch.float32)
    config = LlamaConfig(**{**vars(source.config), "intermediate_size": 192})
    model = Llama(config)
    for (name, p), old in zip(model.named_parameters(), source.parameters()):
        p.data.zero_()[tuple(slice(n) for n in old.shape)] = old.data
    folder = out / "stories"
    folder.mkdir()
    save_quantized(quantize_model(model, 4, 32), folder)
    pieces = json.loads((MATERIAL / "stories260K" / "vocab.json").read_text())
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    tokenizer = data.load_tokenizer(folder)
    print("  " + "; ".join(export.export(folder, out / "stories.gguf")).replace(f"{out}/", ""))
    starts = ["", "Once upon a time", "Lily and Tom", "The big dog", "One day, a little boy"]
    prompts = [[1, *tokenizer.encode(text)] for text in starts]
    compare(folder, out / "stories.gguf", prompts, seed_texts())


def sentencepiece_model(pieces):
    """A sentencepiece BPE model, as bytes: unk, BOS, EOS, 256 bytes, then pieces in the order of their merging."""
    def field(number, value):
        if isinstance(value, bytes):
            return varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3) + varint(value)

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    model = b""
    for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces[3:]]):
        kind = (2, 3, 3)[i] if i < 3 else 6 if i < 259 else 1
        text = piece if i < 259 else piece.replace(" ", "▁")
        model += field(1, field(1, text.encode()) + field(2, float(min(0, 259 - i))) + field(3, kind))
    trainer = field(3, 2) + field(35, 1)  # model_type BPE, byte_fallback
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0)  # add_dummy_prefix, no remove_extra_whitespaces
    return model + field(2, trainer) + field(3, normalizer)


def seed_texts():
    records, _ = data.read_records(MATERIAL / "self-instruct-seeds.json")
    return [part for r in records for part in r]


def check_back_and_forth(out):
    """A file that llama.cpp's own quantizer made: in, fine-tuned (the adapter is random), and out again."""
    print("\na file made by llama.cpp's quantizer, LLaMA's own vocabulary, taken as a base and written back")
    tokenizer = data.load_tokenizer(MATERIAL / "llama-tokenizer.model")
    torch.manual_seed(0)
    model = Llama(LlamaConfig(32000, 256, 768, 2, 4, 2, rms_norm_eps=1e-5))
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    folder = out / "wide"
    folder.mkdir()
    save_quantized(quantize_model(model, 4, 32), folder)
    (folder / "tokenizer.model").write_bytes((MATERIAL / "llama-tokenizer.model").read_bytes())
    export.export(folder, out / "wide.gguf")
    dequantize_file(out / "wide.gguf", out / "float.gguf", np.float16)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1, 2
    llama_cpp.llama_model_quantize(bytes(out / "float.gguf"), bytes(out / "theirs.gguf"), ctypes.byref(options))
    before = {t.name: t for t in gguf.GGUFReader(out / "theirs.gguf").tensors}
    kinds = {name: before[f"{name}.weight"].tensor_type.name for name in ("token_embd", "output", "blk.0.ffn_down")}
    print("  its types: " + ", ".join(f"{name} {kind}" for name, kind in kinds.items()))
    base = out / "base"
    base.mkdir()
    export.check_gguf(out / "theirs.gguf", tokenizer)
    export.import_gguf(out / "theirs.gguf", base)
    (base / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    export.export(base, out / "same.gguf")
    same = (out / "same.gguf").read_bytes() == (out / "theirs.gguf").read_bytes()
    report("written back untouched, byte for byte", "equal" if same else "different", same)
    model = add_adapters(load_quantized(base), 8, 16.0)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.03)
    save_quantized(merge(model), base)
    export.export(base, out / "tuned.gguf")
    equal = others = 0
    for t in gguf.GGUFReader(out / "tuned.gguf").tensors:
        old, new = (x.data.tobytes() for x in (before[t.name], t))
        if t.name.startswith("blk.") and "norm" not in t.name:
            old, new = (np.frombuffer(x, np.uint8).reshape(-1, 20) for x in (old, new))
            equal += np.array_equal(np.delete(old, [2, 3], axis=1), np.delete(new, [2, 3], axis=1))  # all but m
        else:
            others += old == new
    report("fine-tuned: linears with equal d and codes", f"{equal} of 14", equal == 14)
    report("fine-tuned: other tensors, equal bytes", f"{others} of 7", others == 7)
    prompts = [[1, *tokenizer.encode(text)][:100] for text in seed_texts()[:6]]
    compare(base, out / "tuned.gguf", prompts, seed_texts(), greedy=False)  # random weights have nothing to say


def dequantize_file(path, out, dtype):
    """Writes a GGUF file anew with all its matrices in `dtype`."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "general.file_type")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for t in reader.tensors:
        w = gguf.dequantize(t.data, t.tensor_type)
        writer.add_tensor(t.name, w.astype(dtype) if w.ndim == 2 else w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, nargs="?", default=pathlib.Path("runs/tiny"))
    run = parser.parse_args().run
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    packages = ("llama-cpp-python", "transformers", "gguf", "sentencepiece", "torch")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as out:
        check_run(run, pathlib.Path(out))
        check_stories(pathlib.Path(out))
        check_back_and_forth(pathlib.Path(out))
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
