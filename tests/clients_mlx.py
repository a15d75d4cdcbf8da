"""Does mlx-lm compute what we compute, on folders that export.py writes?

`check_clients.py` runs this, as clients_mlx.py RUN [SMOLLM2.gguf]. mlx-lm loads each folder and
computes in float32: its parameters are cast, which leaves every scale and offset as it is. Logits
are compared with ours and with a LLaMA in float64 on the folder's own numbers. They are equal to
1e-6. In a deep model that is less than float32's rounding; then mlx-lm's in float64 are, and the
line ends with how far. (So it is with an adapter over a quantized embedding, which is rounded to
bfloat16 here.) Greedy texts and the tokens of texts must be equal.
"""

import contextlib
import functools
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile
import unittest.mock

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx_lm  # noqa: E402
import mlx_lm.utils  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import forget_rest  # noqa: E402
from helpers_clients import (  # noqa: E402
    MATERIAL,
    STARTS,
    seed_texts,
    stories,
    stories_tokenizer,
    texts_of,
)
from helpers_mlx import FromFolder, relative  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

import formats  # noqa: E402
from export import export_mlx  # noqa: E402
from formats.huggingface import save_pretrained  # noqa: E402
from formats.quantized import save_quantized  # noqa: E402
from llama import linears  # noqa: E402
from merge import merge  # noqa: E402
from qalora import adapter_parameters, add_adapters  # noqa: E402
from quant import QuantLinear, quantize_model, quantize_rtn  # noqa: E402
from text.batches import encode_asking  # noqa: E402
from text.instructions import read_records  # noqa: E402
from text.tokenizer import load_tokenizer  # noqa: E402
from text.toy import make_world  # noqa: E402

LIMIT = 1e-6
failures = []


def report(what, found, good=True):
    """Prints one result and remembers a bad one."""
    print(f"  {what:44} {found}{'' if good else '   <-- FAILED'}", flush=True)
    if not good:
        failures.append(what)


class MLX:
    """A folder as mlx-lm loads it, in float32."""

    def __init__(self, folder):
        self.model, self.tokenizer = mlx_lm.load(str(folder))
        self.model.update(in_dtype(self.model.parameters(), mx.float32))

    def logits(self, tokens):
        return np.array(self.model(mx.array([tokens]))[0]).astype(np.float64)

    def greedy(self, tokens, count):
        """The tokens of mlx-lm's own generation, without what ended it."""
        said = []
        for response in mlx_lm.stream_generate(self.model, self.tokenizer, tokens, count):
            said.append(response.token)
        return said[:-1] if said[-1] in self.tokenizer.eos_token_ids else said

    def tokens(self, text):
        """Of a text alone; what spells a control token stays a text, as it does for us."""
        options = dict(add_special_tokens=False, split_special_tokens=True)
        return self.tokenizer._tokenizer.encode(text, **options)


class WideMLX(MLX):
    """The same in float64: dense weights, and what MLX computes in float32 whatever the dtype.

    That is norms, rotary embedding and attention; mlx-lm's own code puts all of it together.
    """

    def __init__(self, folder):
        super().__init__(folder)
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
                plain = nn.Linear if isinstance(layer, nn.QuantizedLinear) else nn.Embedding
                dense = plain(1, 1)
                dense.update({"weight": wide_weight(layer)})
                dense.pop("bias", None)
                owner, _, leaf = name.rpartition(".")
                setattr(
                    functools.reduce(child, filter(None, owner.split(".")), self.model), leaf, dense
                )
        self.model.update(in_dtype(self.model.parameters(), mx.float64))
        self.model.model.norm = functools.partial(wide_norm, self.model.model.norm)
        for layer in self.model.layers:
            layer.self_attn.rope = functools.partial(wide_rope, layer.self_attn.rope)
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, functools.partial(wide_norm, layer[name]))

    def logits(self, tokens):
        with unittest.mock.patch(
            "mlx_lm.models.llama.scaled_dot_product_attention", wide_attention
        ):
            return super().logits(tokens)


def wide_norm(norm, x):
    """What nn.RMSNorm does, in the dtype of x."""
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + norm.eps) * norm.weight


def wide_attention(queries, keys, values, cache, scale, mask):
    """Causal attention [B, H, T, K], in the dtype of the queries."""
    shared, T = queries.shape[1] // keys.shape[1], queries.shape[2]
    keys, values = (mx.repeat(x, shared, axis=1) for x in (keys, values))
    assert mask == "causal" or T == 1
    scores = queries @ keys.swapaxes(-1, -2) * scale
    hidden = mx.array(np.triu(np.full((T, T), -1e300), 1), dtype=mx.float64)
    exponents = mx.exp(scores + hidden - (scores + hidden).max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True) @ values


def wide_rope(rope, x, offset=0):
    """What nn.RoPE does to x [B, H, T, K], with angles in float64."""
    assert not rope.traditional and rope.dims == x.shape[-1]
    positions = rope.scale * np.arange(offset, offset + x.shape[2])
    angles = np.outer(positions, rope.base ** (-np.arange(0, rope.dims, 2) / rope.dims))
    cos, sin = (mx.array(f(angles), dtype=mx.float64) for f in (np.cos, np.sin))
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def child(module, name):
    return module[int(name)] if name.isdigit() else getattr(module, name)


def wide_weight(layer):
    """scale * code + bias in float64; the codes are what scales of 1 give."""
    ones, size = mx.ones(layer.scales.shape), layer.group_size
    codes = mx.dequantize(layer.weight, ones, 0 * ones, size, layer.bits).astype(mx.float64)
    groups = codes.reshape(*layer.scales.shape, size)
    scales, biases = (p.astype(mx.float64)[..., None] for p in (layer.scales, layer.biases))
    return (groups * scales + biases).reshape(codes.shape)


def in_dtype(parameters, dtype):
    """Every float parameter in `dtype`."""

    def cast(p):
        return p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p

    return tree_map(cast, parameters)


@torch.no_grad()
def our_logits(model, tokens):
    return model(torch.tensor([tokens]))[0].double().numpy()


@torch.no_grad()
def our_greedy(model, tokens, count, stops):
    """The same, without a cache."""
    said = []
    while len(said) < count:
        token = model(torch.tensor([[*tokens, *said]]))[0, -1].argmax().item()
        if token in stops:
            break
        said.append(token)
    return said


def compare(name, folder, written, prompts, texts, count=24):
    """Compares mlx-lm on the folder `written` with us on the folder it was exported from."""
    tokenizer = formats.load_tokenizer(folder)
    ours, theirs = formats.load_model(folder, torch.float32), MLX(written)
    exact = FromFolder(written)
    errors = []
    for prompt in prompts:
        mine, its, true = our_logits(ours, prompt), theirs.logits(prompt), exact.logits(prompt)
        errors.append((relative(its, mine), relative(mine, true), relative(its, true)))
    apart, our_error, their_error = np.max(errors, axis=0)
    greedy = 0
    for prompt in prompts:
        mine = our_greedy(ours, prompt, count, tokenizer.stops)
        greedy += mine == theirs.greedy(prompt, count)
    same = sum(theirs.tokens(text) == tokenizer.encode(text) for text in texts)
    whole = [*tokenizer.bos, *tokenizer.encode(texts[0])]
    stops = theirs.tokenizer.eos_token_ids == set(tokenizer.stops)
    begins = theirs.tokenizer.encode(texts[0]) == whole
    wide = None
    if apart >= LIMIT:
        client = WideMLX(written)
        wide = max(relative(client.logits(prompt), exact.logits(prompt)) for prompt in prompts)
    good = apart < LIMIT or wide < LIMIT
    good &= greedy == len(prompts) and same == len(texts) and stops and begins
    found = f"{apart:.1e}  {our_error:.1e}  {their_error:.1e}  {greedy} of {len(prompts)}  "
    found += f"{same} of {len(texts)}  {'yes' if stops and begins else 'no'}"
    found += f"  {wide:.1e}" if wide else ""
    report(name, found, good)
    return theirs


# ---- what is compared


def check_run(run, out):
    """A fine-tuned run at 4 bits; its base at 3 and 2."""
    tokenizer, world = formats.load_tokenizer(run), make_world()
    prompts = [encode_asking(record[:-1], tokenizer) for record in world.test[:10]]
    texts = texts_of([*world.train, *world.test])
    export_mlx(run, out / "run")
    compare("a run on the toy world, 4 bits", run, out / "run", prompts, texts)
    for bits in (3, 2):
        folder = requantized(run, bits, out / f"toy-{bits}")
        export_mlx(folder, out / f"run-{bits}")
        compare(f"  the same to {bits} bits", folder, out / f"run-{bits}", prompts, texts)


def check_stories(out):
    """stories260K, whose feed-forward width is filled up with zeros to 192: the same function."""
    for bits in (4, 3, 2):
        folder = out / f"stories-{bits}"
        folder.mkdir()
        save_quantized(quantize_model(stories(), bits, 32), folder)
        (folder / "tokenizer.model").write_bytes(stories_tokenizer())
        tokenizer = load_tokenizer(folder)
        prompts = [[1, *tokenizer.encode(text)] for text in STARTS]
        export_mlx(folder, out / f"stories-mlx-{bits}")
        compare(
            f"stories260K, {bits} bits", folder, out / f"stories-mlx-{bits}", prompts, seed_texts()
        )


def check_smollm2(file, out):
    """SmolLM2 from its GGUF file at 4 bits; rounded at 3 and 2; then with a random adapter."""
    folder = out / "smollm2"
    folder.mkdir()
    formats.import_base(file, folder)
    tokenizer = formats.load_tokenizer(file)
    tokenizer.save(folder)
    asked = read_records(MATERIAL / "self-instruct-seeds.json").records[:3]
    prompts = [encode_asking(record[:-1], tokenizer) for record in asked]
    for bits in (4, 3, 2):
        source = folder if bits == 4 else requantized(folder, bits, out / f"smollm2-{bits}")
        export_mlx(source, out / f"smollm2-mlx-{bits}")
        compare(
            f"SmolLM2-135M-Instruct, {bits} bits",
            source,
            out / f"smollm2-mlx-{bits}",
            prompts,
            seed_texts(),
            count=16,
        )
    adapted(folder)
    export_mlx(folder, out / "smollm2-adapted")
    compare("  with an adapter", folder, out / "smollm2-adapted", prompts, seed_texts(), count=16)


def check_back_and_forth(run, out):
    """A folder that mlx_lm.convert makes is a base, and comes back."""
    folder = out / "float"
    folder.mkdir()
    model, tokenizer = formats.load_model(run), formats.load_tokenizer(run)
    for name, layer in linears(model):
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight.data = layer.dequantize()
        model.set_submodule(name, dense)
    save_pretrained(model, folder)
    world = make_world()
    prompts = [encode_asking(record[:-1], tokenizer) for record in world.test[:5]]
    export_mlx(run, out / "with-tokenizer")
    for file in (out / "with-tokenizer").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    for recipe in (None, "mixed_2_6", "mixed_3_4"):
        source, base, back = (out / f"{recipe}-{name}" for name in ("source", "base", "back"))
        options = dict(quantize=True, q_group_size=32, q_bits=4, dtype="bfloat16")
        with contextlib.redirect_stdout(sys.stderr):
            mlx_lm.convert(str(folder), str(source), quant_predicate=recipe, **options)
        base.mkdir()
        formats.import_base(source, base)
        formats.load_tokenizer(run).save(base)
        export_mlx(base, back)
        before, after = FromFolder(source), FromFolder(back)
        equal = before.config == after.config and before.tensors.keys() == after.tensors.keys()
        for name, tensor in before.tensors.items():
            other = after.tensors[name]
            equal &= tensor.dtype == other.dtype and torch.equal(tensor, other)
        report(f"mlx_lm.convert, {recipe or '4 bits'}: in and out", equal, equal)
        fresh = out / f"{recipe}-fresh"  # as of any other mixed model, with floats for 6 bits
        shutil.copytree(base, fresh)
        forget_rest(fresh)
        export_mlx(fresh, out / f"{recipe}-out")
        compare("  as a new folder", fresh, out / f"{recipe}-out", prompts, texts_of(world.test))
        adapted(base)
        export_mlx(base, out / f"{recipe}-adapted")
        compare(
            "  and with an adapter",
            base,
            out / f"{recipe}-adapted",
            prompts,
            texts_of(world.test),
        )


def requantized(source, bits, folder):
    """A quantized model rounded again, to fewer bits."""
    model = formats.load_model(source)
    for name, layer in linears(model):
        quantized = quantize_rtn(layer.dequantize(), bits, layer.group_size)
        model.set_submodule(name, QuantLinear.from_quantized(quantized, bits))
    folder.mkdir()
    save_quantized(model, folder)
    formats.load_tokenizer(source).save(folder)
    return folder


def adapted(folder):
    """Merges a random adapter into the model of a folder."""
    model = add_adapters(formats.load_model(folder), 4, 8.0)
    torch.manual_seed(0)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.02)
    save_quantized(merge(model), folder)


def main():
    run, smollm2 = pathlib.Path(sys.argv[1]), "".join(sys.argv[2:])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm")]
    print(", ".join(versions))
    print("\nrelative difference of logits: mlx-lm and us, us and float64, mlx-lm and float64;")
    print(
        "prompts with equal greedy text; texts with equal tokens; whether BOS and ends are equal;"
    )
    print("where float32 rounds more than 1e-6: mlx-lm in float64 and float64")
    with tempfile.TemporaryDirectory() as out:
        out = pathlib.Path(out)
        check_run(run, out)
        check_stories(out)
        check_back_and_forth(run, out)
        if smollm2:
            check_smollm2(pathlib.Path(smollm2), out)
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
