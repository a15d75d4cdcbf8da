"""Do real clients agree with us on an exported file? llama.cpp and transformers load it and are compared.

    pip install gguf transformers llama-cpp-python          (the last compiles llama.cpp: about 10 minutes on 2 cores)
    python train.py                                         (makes runs/tiny)
    python tests/check_llamacpp.py runs/tiny | tee results/llamacpp.txt

A person runs this; CI has no llama.cpp and reads files back in test_export.py. It ends with status 1 where a check
failed. transformers computes in float32. llama.cpp rounds activations to 8 bits where the weights are Q4_1, which
moves logits by 1 to 3 % and decides a greedy text where two tokens are almost equally likely. Two things show that
nothing else does. Given the very same weights, of the same file, as float32, it says what we say. And from its own
results so far, each of its layers goes on as ours does with activations rounded in the same way. (From the tokens on,
no emulation stays with it: now and then the last bit decides how one activation is rounded, and later many more.)
"""

import argparse
import ctypes
import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
import struct
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import llama_cpp
import numpy as np
import torch
import torch.nn.functional as F
import transformers

import data
import export
import train
from llama import LINEARS, Llama, LlamaConfig, generate, linears, load_pretrained
from merge import load_model, merge
from qalora import adapter_parameters, add_adapters
from quant import Quantized, dequantize, load_quantized, quantize_model, save_quantized, unpack

MATERIAL = ROOT.parent / "shared" / "data"
NEW_TOKENS = 60
RESULTS = {"q_proj": "Qcur", "k_proj": "Kcur", "v_proj": "Vcur", "o_proj": "attn_out", "gate_proj": "ffn_gate",
           "up_proj": "ffn_up", "down_proj": "ffn_out"}  # what llama.cpp calls the result of each layer
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
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False  # AMX: on a Xeon this build crashed with it, on llama.cpp's own Q4_1 files, too
        llama_cpp.llama_cpp.llama_model_default_params = lambda: params
        self.model = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, n_threads=2, verbose=False,
                                     type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)

    def results(self, tokens):
        """{name: result [T, O]} of all that is computed for the logits; of several results of a name, the first."""
        ggml, found = llama_cpp.llama_cpp._lib, {}  # which loads libggml, too
        ggml.ggml_get_name.restype, ggml.ggml_nbytes.restype = ctypes.c_char_p, ctypes.c_size_t

        @llama_cpp.ggml_backend_sched_eval_callback
        def watch(address, before, _):
            tensor = ctypes.c_void_p(address)
            name = ggml.ggml_get_name(tensor).decode()
            if not before and name not in found:
                found[name] = torch.empty(ggml.ggml_nbytes(tensor) // 4)
                ggml.ggml_backend_tensor_get(tensor, ctypes.c_void_p(found[name].data_ptr()), ctypes.c_size_t(0),
                                             ctypes.c_size_t(4 * len(found[name])))
            return True

        self.model.context_params.cb_eval = watch
        self.model._ctx = llama_cpp._internals.LlamaContext(model=self.model._model, params=self.model.context_params,
                                                            verbose=False)
        self.logits(tokens)
        return {name: values.view(len(tokens), -1) for name, values in found.items() if not len(values) % len(tokens)}

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


class AsInFile(Ours):
    """The same in the numbers of the exported file, where offsets, embedding and head have fewer bits."""

    def __init__(self, folder, file):
        super().__init__(folder)
        tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
        for name, p in self.model.named_parameters():
            t = tensors[export.gguf_name(name)]
            p.data = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for layer in export.quantized_layers(self.model).values():
            layer.offset = layer.offset.half().float()
        self.head_type = tensors["output.weight"].tensor_type.name

    def rounding(self, tokens, theirs=None):
        """(logits, relative errors) with activations rounded as llama.cpp rounds them on a CPU.

        theirs: its `results`. Then each layer starts from those of the layers before it, and has two errors, one with
        exact activations and one with rounded ones.
        """
        layers, errors = linears(self.model, (*LINEARS, "lm_head")), []

        def replace(name, layer, inputs, exact):
            rounded = (self.head if name == "lm_head" else q4_1_layer)(layer, inputs[0])
            if theirs is None:
                return rounded
            expected = self.expected(name, theirs)
            errors.append((relative_error(exact[0], expected), relative_error(rounded[0], expected)))
            return expected[None]

        hooks = [layer.register_forward_hook(functools.partial(replace, name)) for name, layer in layers]
        logits = self.logits(tokens)
        for hook in hooks:
            hook.remove()
        return logits, errors

    def expected(self, name, theirs):
        """The result of the layer `name` among llama.cpp's, in our order of rows."""
        if name == "lm_head":
            return theirs["result_output"]
        _, _, i, module = name.split(".", 3)
        y, heads = theirs[f"{RESULTS[module.split('.')[1]]}-{i}"], export.rotary_heads(name, self.model.config)
        return y.unflatten(1, (heads, -1, 2)).transpose(2, 3).flatten(1) if heads else y

    def head(self, layer, x):
        """The output head: in float16 or, for Q6_K, in blocks of 256 activations of 8 bits."""
        if self.head_type == "F16":
            return F.linear(x.half().float(), layer.weight)
        codes, d = eight_bits(x, 256)
        return F.linear((codes * d).flatten(-2), layer.weight)


def eight_bits(x, size):
    """Activations in blocks: their codes from -127 to 127, [..., I / size, size], and scales."""
    blocks = x.unflatten(-1, (-1, size))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / d).round().nan_to_num(), d


def q4_1_layer(layer, x):
    """A layer with groups of 32 as llama.cpp's Q4_1 times Q8_1: the blocks' scales and sums are float16."""
    codes, d = eight_bits(x, 32)
    sums = (codes.sum(-1, keepdim=True) * d).half().float()
    w = dequantize(Quantized(unpack(layer.packed, 4, layer.in_features), layer.scale, torch.zeros_like(layer.offset)))
    return F.linear((codes * d.half().float()).flatten(-2), w) + F.linear(sums.squeeze(-1), layer.offset)


def compare(folder, file, prompts, texts, greedy="equal"):
    """Compares what clients say of `file` with what we say of `folder`: tokens of texts, logits, greedy text.

    greedy: "equal"; "undecided" where the model is so unsure that rounding may decide; None for no text at all.
    """
    tokenizer, llamacpp = data.load_tokenizer(folder), LlamaCpp(file)
    ours, in_file = Ours(folder), AsInFile(folder, file)
    equal = sum(llamacpp.tokenize(text) == tokenizer.encode(text) for text in texts)
    report("llama.cpp: texts with equal tokens", f"{equal} of {len(texts)}", equal == len(texts))
    as_float32 = file.with_name(f"{file.stem}-float32.gguf")
    dequantize_file(file, as_float32, np.float32)
    for name, client in (("llama.cpp", llamacpp), ("llama.cpp, weights as float32", LlamaCpp(as_float32)),
                         ("transformers", Transformers(file))):
        print(f"  {name}")
        rounds = client is llamacpp
        errors, in_file_errors = ([relative_error(client.logits(p), mine.logits(p)) for p in prompts]
                                  for mine in (ours, in_file))
        report("  relative error of logits", f"{np.mean(errors):.2%} on average, {max(errors):.2%} at most",
               max(errors) < (0.03 if rounds else 0.003))
        if rounds:
            compare_rounding(client, in_file, prompts, np.mean(in_file_errors))
        else:
            report("  from the numbers in the file", f"{max(in_file_errors):.1e} at most", max(in_file_errors) < 1e-5)
        if greedy:
            compare_greedy(client, ours, prompts, tokenizer.eos_id(), may_part=rounds and greedy == "undecided")
    if greedy:
        print(f"  such as: {tokenizer.decode(ours.greedy(prompts[0], tokenizer.eos_id()))!r}")


def compare_rounding(client, in_file, prompts, error):
    """Rounding activations explains the whole `error` of the client's logits, and what each layer computes."""
    moved = np.mean([relative_error(in_file.rounding(p)[0], in_file.logits(p)) for p in prompts])
    report("  our logits, activations rounded alike", f"move by {moved:.2%} on average",
           2 / 3 < error / moved < 3 / 2)
    exact, rounded = zip(*(pair for p in prompts for pair in in_file.rounding(p, client.results(p))[1]))
    report("  relative error of a single layer", f"{np.mean(exact):.2%} on average", True)
    report("  with our activations rounded alike", f"{np.mean(rounded):.1e} on average, {max(rounded):.1e} at most",
           np.mean(rounded) < 3e-5 and max(rounded) < 1e-3)


def compare_greedy(client, ours, prompts, eos, may_part):
    """Greedy texts are equal; or, where they may, part where our likeliest tokens are closer than the rounding."""
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
    compare(folder, out / "stories.gguf", prompts, seed_texts(), greedy="undecided")


def check_trained(out):
    """A model of stories260K's shape, trained with a feed-forward width of 192 on eight texts until it is sure of them."""
    print("\nstories260K's shape with a feed-forward width of 192, trained on eight texts by heart, 4 bits by RTN")
    records, _ = data.read_records(MATERIAL / "self-instruct-seeds.json")
    texts = [r.response for r in records if 150 <= len(r.response) <= 250][:8]
    world = types.SimpleNamespace(documents=lambda rng: rng.sample(texts, len(texts)), train=[])
    config = LlamaConfig(512, 64, 192, 5, 8, 4, max_position_embeddings=512)
    train.pretrain(world, out / "by-heart", config, steps=600, lr=3e-3, length=96)
    folder = out / "trained"
    folder.mkdir()
    save_quantized(quantize_model(load_pretrained(out / "by-heart"), 4, 32), folder)
    shutil.copyfile(out / "by-heart" / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = data.load_tokenizer(folder)
    print("  " + "; ".join(export.export(folder, out / "trained.gguf")).replace(f"{out}/", ""))
    compare(folder, out / "trained.gguf", [[1, *tokenizer.encode(text)][:12] for text in texts], seed_texts())


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
    compare(base, out / "tuned.gguf", prompts, seed_texts(), greedy=None)  # random weights have nothing to say


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
        check_trained(pathlib.Path(out))
        check_stories(pathlib.Path(out))
        check_back_and_forth(pathlib.Path(out))
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
