"""GGUF files in Q4_0 and Q4_K, and with layers in other types: fine-tuned, and written back.

The gguf package reads what comes out; llama.cpp itself does in check_clients.py.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from helpers import codes_of, forget_rest
from helpers_gguf import (
    TOKENS,
    FromFile,
    Type,
    gguf,
    imported,
    our_logits,
    quantize_file,
    relative_error,
    run_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import formats
from cli.errors import UserError
from formats import load_model
from formats.gguf import gguf_name
from formats.gguf_blocks import from_blocks, rotary_heads
from formats.quantized import save_quantized
from llama import LINEARS, LlamaConfig
from qalora import add_adapters
from quant import QuantLinear
from text.tokenizer import load_tokenizer

WIDE = LlamaConfig(300, 256, 512, 2, 8, 4, max_position_embeddings=77, rms_norm_eps=1e-5)
ALL = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
K_M = dict.fromkeys(ALL, Type.Q4_K) | {"1.attn_v": Type.Q6_K, "1.ffn_down": Type.Q6_K}
MIXES = {  # name: (types by the ends of names, general.file_type, that after all was tuned)
    "Q4_0": (dict.fromkeys(ALL, Type.Q4_0), 2, 3),
    "Q4_K_S": (dict.fromkeys(ALL, Type.Q4_K) | {"0.ffn_down": Type.Q5_K}, 14, 3),
    "Q4_K_M": (K_M | {"token_embd": Type.Q4_K}, 15, 3),
    "all kinds": (
        {"attn_q": Type.Q4_K, "attn_k": Type.Q4_0, "0.attn_k": Type.F16, "0.attn_q": Type.Q8_0},
        2,
        3,
    ),
}
FROZEN = ("Q5_K", "Q6_K", "F16", "Q8_0")


@pytest.fixture(params=MIXES)
def mix(request, tmp_path, tokenizer_file):
    """(file, the folder it was imported to, its file types before and after tuning)."""
    kinds, before, after = MIXES[request.param]

    def change(metadata, tensors):
        metadata["general.file_type"] = before, gguf.GGUFValueType.UINT32

    file, tokenizer = tmp_path / "in.gguf", load_tokenizer(tokenizer_file)
    quantize_file(file, WIDE, tokenizer, Type.Q6_K, change, kinds)
    return file, imported(file, tokenizer_file, tmp_path / "base"), before, after


tuned = functools.partial(run_of, std=0.1)  # so that it shows in the logits


def in_groups(file):
    """The tensors of linear layers that can take up an adapter, by our names of the layers."""
    found = {}
    for i in range(WIDE.num_hidden_layers):
        for name in LINEARS:
            part = "self_attn" if name in LINEARS[:4] else "mlp"
            layer = f"model.layers.{i}.{part}.{name}"
            tensor = file.tensors[gguf_name(f"{layer}.weight")]
            if tensor.tensor_type.name not in FROZEN:
                found[layer] = tensor
    return found


def test_it_computes_here_what_the_file_says_and_comes_back_byte_for_byte(mix, tmp_path):
    file, folder, _, _ = mix
    expected = FromFile(file).logits(TOKENS)
    # norms, embedding and frozen layers round to float16
    assert relative_error(our_logits(folder, TOKENS), expected) < 5e-3
    assert torch.equal(
        load_model(folder)(torch.tensor([TOKENS])), load_model(file)(torch.tensor([TOKENS]))
    )
    export.export(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == file.read_bytes()


def test_layers_in_other_types_are_named_as_frozen_and_have_no_adapter(mix):
    file, folder, _, _ = mix
    wanted = in_groups(FromFile(file))
    model = add_adapters(load_model(folder), 2, 4.0)
    adapted = {
        n.removesuffix(".base") for n, m in model.named_modules() if isinstance(m, QuantLinear)
    }
    assert adapted == wanted.keys()
    for path in (file, folder):
        layers = formats.quantization_of(path).get("layers", {})
        assert not set(layers) & wanted.keys()
        assert len(layers) == 7 * WIDE.num_hidden_layers - len(wanted)
        assert all(kind is None for kind in layers.values())


def test_fine_tuning_writes_tuned_layers_as_q4_1_with_the_same_codes(mix, tmp_path):
    file, folder, _, after_tuning = mix
    run = tuned(folder, tmp_path / "run")
    lines = export.export(run, tmp_path / "out.gguf")
    before, after = FromFile(file), FromFile(tmp_path / "out.gguf")
    assert after.raw.keys() == before.raw.keys()
    layers = in_groups(before)
    for name, tensor in before.tensors.items():
        if tensor not in layers.values():
            assert after.raw[name] == before.raw[name], name
            assert after.tensors[name].tensor_type == tensor.tensor_type, name
    for name, tensor in layers.items():
        written = after.tensors[tensor.name]
        assert written.tensor_type == Type.Q4_1
        old = from_blocks(torch.from_numpy(tensor.data.copy()), tensor.tensor_type.name, name)
        new = from_blocks(torch.from_numpy(written.data.copy()), "Q4_1", name)
        assert torch.equal(codes_of(new), codes_of(old)), name
        assert torch.equal(new.scale, old.scale.half()), name
        assert not torch.equal(new.offset, old.offset), name
    changed = {"general.file_type": after_tuning}
    assert after.metadata == {**before.metadata, **changed}
    assert relative_error(after.logits(TOKENS), our_logits(run, TOKENS)) < 5e-3
    assert relative_error(before.logits(TOKENS), our_logits(run, TOKENS)) > 5e-2
    assert any("float16, whose rounding moves weights by" in line for line in lines)


def test_layers_that_were_not_tuned_keep_their_type_and_bytes(mix, tmp_path):
    file, folder, type_before, _ = mix
    run = tuned(folder, tmp_path / "run", targets=["o_proj"])
    export.export(run, tmp_path / "out.gguf")
    before, after = FromFile(file), FromFile(tmp_path / "out.gguf")
    for name, tensor in before.tensors.items():
        same = after.raw[name] == before.raw[name]
        assert same == ("attn_output" not in name), name
        if same:
            assert after.tensors[name].tensor_type == tensor.tensor_type
    assert after.metadata["general.file_type"] == type_before


def test_tensors_lie_where_llama_cpp_wants_them(mix, tmp_path):
    """Each where the one before it ends, padded; the file reaches to the end of the last."""
    _, folder, _, _ = mix
    export.export(tuned(folder, tmp_path / "run"), tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    end = reader.data_offset
    for tensor in reader.tensors:
        assert tensor.data_offset == end
        end += -(-int(tensor.n_bytes) // 64) * 64
    assert (tmp_path / "out.gguf").stat().st_size in range(
        int(tensor.data_offset + tensor.n_bytes), end + 1
    )


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.F16, Type.Q5_0, Type.Q6_K])
def test_a_file_without_layers_in_groups_is_refused(tmp_path, tokenizer_file, kind):
    kinds = dict.fromkeys(ALL, kind)
    quantize_file(tmp_path / "in.gguf", WIDE, load_tokenizer(tokenizer_file), mixed=kinds)
    reason = f"blk.0.attn_q.weight is {kind.name}, and only Q4_0, Q4_1, Q4_K can take up an adapter"
    with pytest.raises(UserError, match=reason):
        formats.check(tmp_path / "in.gguf")


@pytest.mark.parametrize("kind, at", [(Type.Q4_0, 0), (Type.Q4_K, 0), (Type.Q4_K, 2)])
def test_numbers_that_are_none_are_refused(tmp_path, tokenizer_file, kind, at):
    def change(metadata, tensors):
        nan = np.array([np.nan], np.float16).view(np.uint8)
        tensors["blk.1.ffn_up.weight"][0][5, at : at + 2] = nan

    kinds = {"ffn_up": kind}
    quantize_file(
        tmp_path / "in.gguf", WIDE, load_tokenizer(tokenizer_file), Type.F16, change, kinds
    )
    with pytest.raises(UserError, match="in.gguf: blk.1.ffn_up.weight has NaN or infinite values"):
        load_model(tmp_path / "in.gguf")


def assert_damaged(folder, out):
    with pytest.raises(UserError, match="gguf.safetensors is missing, damaged, or of another") as e:
        export.export(folder, out)
    assert "\n" not in str(e.value) and not list(out.parent.glob("*out.gguf*"))


def test_what_was_kept_and_is_damaged_since_is_refused(mix, tmp_path):
    _, folder, _, _ = mix
    kept, out = folder / "gguf.safetensors", tmp_path / "out.gguf"
    tensors = {name: t.clone() for name, t in load_file(kept).items()}
    with safe_open(kept, framework="pt") as file:
        layout = json.loads(file.metadata()["layout"])
    first = next(iter(layout["kinds"]))
    for changes in (
        {"size": "x"},
        {"size": 100},
        {"size": -5},
        {"size": 2**40},
        {"size": 2**62},
        {"size": 2 * layout["size"] + 2**17},
        {"size": None},
        {"kinds": [first]},
        {"kinds": {**layout["kinds"], first: "Q9"}},
        {"kinds": {n: kind for n, kind in layout["kinds"].items() if n != first}},
        {"kinds": {n: "Q4_K" if kind != "Q4_K" else "Q4_0" for n, kind in layout["kinds"].items()}},
        {"tensors": []},
        None,
    ):
        metadata = {"layout": json.dumps(layout | changes)} if changes else None
        save_file(tensors, kept, metadata=metadata)
        assert_damaged(folder, out)
    for content in (b"", b"x" * 100, None):
        kept.unlink()
        if content is not None:
            kept.write_bytes(content)
        assert_damaged(folder, out)
    for name, tensor in tensors.items():
        for less in ({}, {name: tensor[: len(tensor) // 2].contiguous()}):
            rest = {n: t for n, t in tensors.items() if n != name} | less
            listed = {"layout": json.dumps(layout | {"tensors": sorted(rest)})}
            save_file(rest, kept, metadata=listed)
            assert_damaged(folder, out)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_model_that_is_not_that_of_what_was_kept_is_refused(mix, tmp_path, name):
    _, folder, _, _ = mix
    model = load_model(folder)
    model.get_parameter(name)[3] *= 2
    save_quantized(model, folder)
    assert_damaged(folder, tmp_path / "out.gguf")


def test_a_file_may_end_without_padding_and_its_last_tensor_grow(tmp_path, tokenizer_file):
    """3 rows of 64 weights: 108 bytes as Q4_0, 120 as Q4_1, and 128 with padding."""
    config = dataclasses.replace(WIDE, hidden_size=64, intermediate_size=3, num_hidden_layers=1)
    file, last = tmp_path / "in.gguf", "blk.0.ffn_up.weight"

    def change(metadata, tensors):
        tensors[last] = tensors.pop(last)

    mixed = dict.fromkeys(ALL, Type.Q4_0) | {"ffn_down": Type.F16}
    quantize_file(file, config, load_tokenizer(tokenizer_file), Type.F16, change, mixed)
    tensor = gguf.GGUFReader(file).tensors[-1]
    assert tensor.name == last
    with file.open("r+b") as f:
        f.truncate(int(tensor.data_offset + tensor.n_bytes))
    folder = imported(file, tokenizer_file, tmp_path / "base")
    export.export(folder, tmp_path / "same.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == file.read_bytes()
    run = tuned(folder, tmp_path / "run")
    export.export(run, tmp_path / "out.gguf")
    after = FromFile(tmp_path / "out.gguf")
    assert relative_error(after.logits(TOKENS), our_logits(run, TOKENS)) < 5e-3


def test_a_model_with_frozen_layers_becomes_a_new_file_too(mix, tmp_path):
    """Without what was kept of the old one: frozen layers are written as float16."""
    _, folder, _, _ = mix
    forget_rest(folder)
    export.export(folder, tmp_path / "out.gguf")
    file = FromFile(tmp_path / "out.gguf")
    assert relative_error(file.logits(TOKENS), our_logits(folder, TOKENS)) < 5e-3
    kinds = {t.tensor_type for n, t in file.tensors.items() if "norm" not in n}
    assert kinds <= {Type.Q4_1, Type.F16}
    assert rotary_heads("model.layers.0.self_attn.k_proj.weight", WIDE) == 4
