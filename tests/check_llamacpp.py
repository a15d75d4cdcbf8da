"""Do real clients agree with us on an exported file? llama.cpp and transformers are compared.

    pip install gguf transformers accelerate llama-cpp-python     (compiles for 10 minutes, 2 cores)
    python train.py                                     (makes runs/tiny)
    python tests/check_llamacpp.py runs/tiny | tee results/llamacpp.txt

A person runs this; CI has no llama.cpp and reads files back in test_export.py. It ends with status
1 where a check failed. transformers computes in float32. llama.cpp rounds activations to 8 bits
where the weights are Q4_1. That moves logits by 1 to 3 % and decides a greedy text where two tokens
are almost equally likely. Two things show that nothing else does. Given the same weights, of the
same file, as float32, it says what we say. And from its own results so far, each of its layers goes
on as ours does with activations rounded in the same way. (From the tokens on, no emulation stays
with it: now and then the last bit decides how one activation is rounded, and later many more.)
"""

import argparse
import ctypes
import dataclasses
import importlib.metadata
import pathlib
import shutil
import sys
import tempfile
import types

from helpers_clients import MATERIAL, STARTS, seed_texts, stories, stories_tokenizer, texts_of

from helpers_llamacpp import (  # isort: skip, it puts the project on the path
    AsInFile,
    LlamaCpp,
    Ours,
    Transformers,
    relative_error,
)

import gguf
import llama_cpp
import numpy as np
import torch
import transformers

from cli.toy import pretrain
from export import export
from formats.gguf import check_tokenizer, import_base
from llama import LLAMA3_SCALING, Llama, LlamaConfig, load_pretrained
from merge import merge
from qalora import adapter_parameters, add_adapters
from quant import load_quantized, quantize_model, save_quantized
from text.batches import encode_asking
from text.instructions import read_records
from text.tokenizer import load_tokenizer
from text.toy import make_world

failures = []


def report(what, found, good):
    """Prints one result and remembers a bad one."""
    print(f"  {what:42} {found}{'' if good else '   <-- FAILED'}", flush=True)
    if not good:
        failures.append(what)


def compare(folder, file, prompts, texts, greedy="equal"):
    """Compares clients with `file` and us with `folder`: tokens of texts, logits, greedy text.

    greedy: "equal"; "undecided" where the model is so unsure that rounding may decide; None for no
    text at all.
    """
    tokenizer, llamacpp = load_tokenizer(folder), LlamaCpp(file)
    ours, in_file = Ours(folder), AsInFile(folder, file)
    equal = sum(llamacpp.tokenize(text) == tokenizer.encode(text) for text in texts)
    report("llama.cpp: texts with equal tokens", f"{equal} of {len(texts)}", equal == len(texts))
    as_float32 = file.with_name(f"{file.stem}-float32.gguf")
    dequantize_file(file, as_float32, np.float32)
    clients = {
        "llama.cpp": llamacpp,
        "llama.cpp, weights as float32": LlamaCpp(as_float32),
        "transformers": Transformers(file),
    }
    for name, client in clients.items():
        print(f"  {name}")
        rounds = client is llamacpp
        errors = [relative_error(client.logits(p), ours.logits(p)) for p in prompts]
        in_file_errors = [relative_error(client.logits(p), in_file.logits(p)) for p in prompts]
        found = f"{np.mean(errors):.2%} on average, {max(errors):.2%} at most"
        report("  relative error of logits", found, max(errors) < (0.03 if rounds else 0.003))
        if rounds:
            compare_rounding(client, in_file, prompts, np.mean(in_file_errors))
        else:
            largest = max(in_file_errors)
            report("  from the numbers in the file", f"{largest:.1e} at most", largest < 1e-5)
        if greedy:
            may_part = rounds and greedy == "undecided"
            compare_greedy(client, ours, prompts, tokenizer.eos, may_part)
    if greedy:
        print(f"  such as: {tokenizer.decode(ours.greedy(prompts[0], tokenizer.eos))!r}")


def compare_rounding(client, in_file, prompts, error):
    """Rounding activations explains all of the `error` of the client's logits, layer by layer."""
    moved = np.mean([relative_error(in_file.rounding(p)[0], in_file.logits(p)) for p in prompts])
    found = f"move by {moved:.2%} on average"
    report("  our logits, activations rounded alike", found, 2 / 3 < error / moved < 3 / 2)
    pairs = []
    for prompt in prompts:
        pairs += in_file.rounding(prompt, client.results(prompt))[1]
    exact, rounded = zip(*pairs, strict=True)
    report("  relative error of a single layer", f"{np.mean(exact):.2%} on average", True)
    found = f"{np.mean(rounded):.1e} on average, {max(rounded):.1e} at most"
    good = np.mean(rounded) < 3e-5 and max(rounded) < 1e-3
    report("  with our activations rounded alike", found, good)


def compare_greedy(client, ours, prompts, eos, may_part):
    """Greedy texts are equal; where they may part, our likeliest tokens are almost as likely."""
    parted = []
    for prompt in prompts:
        theirs, mine = client.greedy(prompt, eos), ours.greedy(prompt, eos)
        if theirs != mine:
            equal = [a == b for a, b in zip(theirs, mine, strict=False)]
            n = equal.index(False)
            expected = ours.logits(prompt + mine[:n])[-1]
            rounding = (client.logits(prompt + mine[:n])[-1] - expected).abs().max().item()
            parted.append(((expected[mine[n]] - expected[theirs[n]]).item(), 2 * rounding, n))
    found = f"{len(prompts) - len(parted)} of {len(prompts)}"
    for gap, rounding, n in parted:
        found += f"; one parts at token {n}, two logits {gap:.3f} apart "
        found += f"(rounding moves them by {rounding:.3f})"
    decided_by_rounding = may_part and all(gap <= rounding for gap, rounding, _ in parted)
    report("  prompts with equal greedy text", found, not parted or decided_by_rounding)


# ---- what is compared


def check_run(run, out):
    """A fine-tuned run, exported as it is."""
    print(f"\nthe run {run.name}: fine-tuned, merged, exported")
    tokenizer, world = load_tokenizer(run), make_world()
    print("  " + "; ".join(export(run, out / "run.gguf")).replace(f"{out}/", ""))
    prompts = [encode_asking(record[:-1], tokenizer) for record in world.test[:20]]
    compare(run, out / "run.gguf", prompts, texts_of([*world.train, *world.test]))


def check_stories(out):
    """stories260K, whose feed-forward width is filled up with zeros to 192: the same function."""
    print("\nstories260K (feed-forward 172 filled up to 192), 4 bits in groups of 32 by RTN")
    folder = out / "stories"
    folder.mkdir()
    save_quantized(quantize_model(stories(), 4, 32), folder)
    (folder / "tokenizer.model").write_bytes(stories_tokenizer())
    tokenizer = load_tokenizer(folder)
    print("  " + "; ".join(export(folder, out / "stories.gguf")).replace(f"{out}/", ""))
    prompts = [[1, *tokenizer.encode(text)] for text in STARTS]
    compare(folder, out / "stories.gguf", prompts, seed_texts(), greedy="undecided")


def check_trained(out):
    """A model of stories260K's shape, feed-forward width 192, that knows eight texts by heart."""
    print("\nstories260K's shape, feed-forward 192, trained on eight texts by heart, 4 bits by RTN")
    records = read_records(MATERIAL / "self-instruct-seeds.json").records
    texts = [r[-1].text for r in records if 150 <= len(r[-1].text) <= 250][:8]
    world = types.SimpleNamespace(documents=lambda rng: rng.sample(texts, len(texts)), train=[])
    config = LlamaConfig(512, 64, 192, 5, 8, 4, max_position_embeddings=512)
    pretrain(world, out / "by-heart", config, steps=600, lr=3e-3, length=96)
    folder = out / "trained"
    folder.mkdir()
    save_quantized(quantize_model(load_pretrained(out / "by-heart"), 4, 32), folder)
    shutil.copyfile(out / "by-heart" / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    print("  " + "; ".join(export(folder, out / "trained.gguf")).replace(f"{out}/", ""))
    prompts = [[1, *tokenizer.encode(text)][:12] for text in texts]
    compare(folder, out / "trained.gguf", prompts, seed_texts())


def check_back_and_forth(out):
    """A file of llama.cpp's quantizer: in, fine-tuned (the adapter is random), and out again."""
    print(
        "\na file made by llama.cpp's quantizer, LLaMA's own vocabulary, as a base and written back"
    )
    tokenizer = load_tokenizer(MATERIAL / "llama-tokenizer.model")
    torch.manual_seed(0)
    model = Llama(LlamaConfig(32000, 256, 768, 2, 4, 2, rms_norm_eps=1e-5))
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    folder = out / "wide"
    folder.mkdir()
    save_quantized(quantize_model(model, 4, 32), folder)
    (folder / "tokenizer.model").write_bytes((MATERIAL / "llama-tokenizer.model").read_bytes())
    export(folder, out / "wide.gguf")
    dequantize_file(out / "wide.gguf", out / "float.gguf", np.float16)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1, 2
    files = bytes(out / "float.gguf"), bytes(out / "theirs.gguf")
    llama_cpp.llama_model_quantize(*files, ctypes.byref(options))
    before = {t.name: t for t in gguf.GGUFReader(out / "theirs.gguf").tensors}
    kinds = []
    for name in ("token_embd", "output", "blk.0.ffn_down"):
        kinds.append(f"{name} {before[f'{name}.weight'].tensor_type.name}")
    print("  its types: " + ", ".join(kinds))
    base = out / "base"
    base.mkdir()
    check_tokenizer(out / "theirs.gguf", tokenizer)
    import_base(out / "theirs.gguf", base)
    (base / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    export(base, out / "same.gguf")
    same = (out / "same.gguf").read_bytes() == (out / "theirs.gguf").read_bytes()
    report("written back untouched, byte for byte", "equal" if same else "different", same)
    model = add_adapters(load_quantized(base), 8, 16.0)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.03)
    save_quantized(merge(model), base)
    export(base, out / "tuned.gguf")
    equal = others = 0
    for t in gguf.GGUFReader(out / "tuned.gguf").tensors:
        old, new = (x.data.tobytes() for x in (before[t.name], t))
        if t.name.startswith("blk.") and "norm" not in t.name:
            old, new = (np.frombuffer(x, np.uint8).reshape(-1, 20) for x in (old, new))
            old, new = (np.delete(x, [2, 3], axis=1) for x in (old, new))  # all but m
            equal += np.array_equal(old, new)
        else:
            others += old == new
    report("fine-tuned: linears with equal d and codes", f"{equal} of 14", equal == 14)
    report("fine-tuned: other tensors, equal bytes", f"{others} of 7", others == 7)
    prompts = [[1, *tokenizer.encode(text)][:100] for text in seed_texts()[:6]]
    # no greedy text: random weights have nothing to say
    compare(base, out / "tuned.gguf", prompts, seed_texts(), greedy=None)


def check_newer(out):
    """What came after LLaMA-2, far enough for slow rotary frequencies to matter."""
    print("\nnewer LLaMAs: random weights as float32, 400 tokens, from the numbers in the file")
    wide, linear = dict(head_dim=64), dict(rope_scaling={"rope_type": "linear", "factor": 4.0})
    llama3 = dict(rope_scaling=LLAMA3_SCALING)
    changes = {"head size 64 of 32": wide, "linear scaling": linear, "llama3 scaling": llama3}
    changes["llama3 scaling, head size 64 of 32"] = wide | llama3
    tokens = torch.randint(3, 32000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    for i, (name, fields) in enumerate(changes.items()):
        torch.manual_seed(i)
        folder, file = out / f"newer-{i}", out / f"newer-{i}.gguf"
        folder.mkdir()
        shape = dict(rms_norm_eps=1e-5, rope_theta=5e3)
        model = Llama(LlamaConfig(32000, 128, 256, 2, 4, 2, **shape, **fields))
        for p in model.parameters():
            p.data.mul_(4 if p.dim() > 1 else 1)
        save_quantized(quantize_model(model, 4, 32), folder)
        shutil.copyfile(MATERIAL / "llama-tokenizer.model", folder / "tokenizer.model")
        export(folder, file)
        dequantize_file(file, out / "newer-float32.gguf", np.float32)
        theirs = LlamaCpp(out / "newer-float32.gguf").logits(tokens)
        ours = AsInFile(folder, file)
        error = relative_error(theirs, ours.logits(tokens))
        found = f"{error:.1e}"
        if ours.model.config.rope_scaling:
            unscaled = dataclasses.replace(ours.model.config, rope_scaling=None)
            ours.model.model.config = unscaled
            found += f" (without the scaling: {relative_error(theirs, ours.logits(tokens)):.1e})"
        report(name, found, error < 1e-5)


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
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
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
        check_newer(pathlib.Path(out))
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
