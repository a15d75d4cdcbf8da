"""MLX's folders, in and out, against mlx's own quantize, dequantize and quantized_matmul.

A whole model is compared with a LLaMA in float64 on the folder's numbers (helpers_mlx.py); mlx-lm
itself runs in clients_mlx.py.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from fixtures_gguf import CONFIG, TEXTS, TIED
from helpers import forget_rest
from helpers_mlx import (
    BAD,
    DOWN,
    DTYPES,
    MIXED,
    TOKENS,
    FromFolder,
    Q,
    V,
    as_bytes,
    change_tensors,
    codes_of,
    mlx_folder,
    mx,
    our_logits,
    relative,
    tune,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import formats
import merge
import train
from cli.errors import UserError
from formats import mlx, quantized
from formats.files import Stored
from formats.groups import from_stream, imported, to_stream
from formats.huggingface import save_pretrained
from formats.quantized import save_quantized
from formats.rest import MLX_REST
from llama import Llama, linears
from quant import QuantLinear
from text.tokenizer import CHAT_TEMPLATE, JSON, load_tokenizer


@pytest.fixture
def base_of(tmp_path, tokenizer_file):
    """A function that imports a folder of MLX, with a tokenizer."""

    def make(source, name="base"):
        base = tmp_path / name
        base.mkdir()
        formats.import_base(source, base)
        (base / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        return base

    return make


# ---- layers


@given(
    st.integers(0, 2**32),
    st.sampled_from(mlx.BITS),
    st.sampled_from(mlx.GROUPS),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_codes_are_the_bit_stream_that_mlx_reads(seed, bits, group_size, rows, groups):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, groups * group_size), dtype=np.uint8)
    words = to_stream(torch.from_numpy(codes), bits)
    assert words.dtype == torch.uint32 and words.shape == (rows, codes.shape[1] * bits // 32)
    assert np.array_equal(codes_of(words.numpy(), bits), codes)
    ones = mx.ones((rows, groups))
    read = mx.dequantize(mx.array(words.numpy()), ones, 0 * ones, group_size, bits)
    assert np.array_equal(np.array(read), codes)
    assert np.array_equal(from_stream(words, bits).numpy(), codes)


@given(
    st.integers(0, 2**32),
    st.sampled_from([2, 3, 4]),
    st.sampled_from(mlx.GROUPS),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(["normal", "tiny", "huge", "constant"]),
)
@settings(max_examples=60)
def test_a_layer_of_mlx_is_a_layer_of_ours_and_comes_back(seed, bits, group_size, dtype, kind):
    rng = np.random.default_rng(seed)
    rows, inputs = int(rng.integers(1, 20)), group_size * int(rng.integers(1, 4))
    w = rng.normal(0, 1, (rows, inputs)).astype(np.float32)
    w = {"normal": w, "tiny": w * 1e-7, "huge": w * 1e4, "constant": w[:, :1] + 0 * w}[kind]
    words, scales, biases = mx.quantize(mx.array(w).astype(DTYPES[dtype]), group_size, bits)
    theirs = [torch.from_numpy(np.array(words))]
    for part in (scales, biases):
        part = torch.from_numpy(np.array(part.astype(mx.float32)))
        theirs.append(part.to(mlx.FLOATS[dtype]))
    codes = from_stream(theirs[0], bits)
    own = imported(codes, *theirs[1:], bits, "f: t")
    assert torch.equal(own.scale.double(), theirs[1].double())
    in_half = bool((theirs[1].double() == theirs[1].half().double()).all())
    assert own.scale.dtype == (torch.float16 if in_half else torch.float32)
    layer = own
    back = mlx.as_affine("x", layer, *[mlx.FLOATS[dtype]] * 2)
    for name, tensor in zip(("x.weight", "x.scales", "x.biases"), theirs, strict=True):
        assert as_bytes(back[name]) == as_bytes(tensor), name
    x = rng.normal(0, 1, (5, inputs)).astype(np.float32)
    parts = words, scales.astype(mx.float32), biases.astype(mx.float32)
    y = np.array(mx.quantized_matmul(mx.array(x), *parts, True, group_size, bits))
    dense = np.array(mx.dequantize(*parts, group_size, bits)).astype(np.float64)
    spread = np.abs(x).astype(np.float64) @ np.abs(dense).T + 1e-30
    assert (np.abs(layer(torch.from_numpy(x)).numpy() - y) / spread).max() < 1e-5
    assert relative(layer.dequantize().double().numpy(), dense) < 1e-6


# ---- in


def test_a_mixed_folder_is_read_layer_by_layer(tmp_path):
    folder = mlx_folder(tmp_path / "in", MIXED, dtype=mx.float32)
    assert formats.format_of(folder) is mlx and formats.read_config(folder) == CONFIG
    formats.check(folder)
    model = formats.load_model(folder)
    expected = dict.fromkeys((name for name, _ in linears(model)), (4, 32)) | MIXED
    for name, layer in linears(model):
        in_groups = expected[name] is not None and expected[name][0] <= 4
        assert isinstance(layer, QuantLinear) == in_groups, name
        if in_groups:
            assert (layer.bits, layer.group_size) == expected[name]
    assert formats.quantization_of(folder) == quantized.describe(quantized.kinds_of(model))
    assert relative(our_logits(model), FromFolder(folder).logits(TOKENS)) < 1e-5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_what_has_other_bits_is_dequantized_to_the_dtype_of_its_scales(tmp_path, dtype):
    folder = mlx_folder(tmp_path / "in", MIXED, dtype=dtype)
    model, exact = formats.load_model(folder), FromFolder(folder)
    wanted = torch.bfloat16 if dtype == mx.bfloat16 else torch.float16
    for name in (DOWN, "model.embed_tokens", "lm_head", "model.norm"):
        weight = model.get_submodule(name).weight
        assert weight.dtype == wanted and not weight.requires_grad
        assert torch.equal(weight, torch.from_numpy(exact.weight(name)).float().to(wanted)), name
    assert formats.load_model(folder, torch.float32).lm_head.weight.dtype == torch.float32


def test_float_parts_of_several_dtypes_get_one_that_holds_them(tmp_path):
    folder = mlx_folder(tmp_path / "in", {"lm_head": None}, dtype=mx.bfloat16)
    change_tensors(folder, "lm_head.weight", torch.Tensor.float)
    model = formats.load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative(our_logits(model), FromFolder(folder).logits(TOKENS)) < 1e-2


def test_a_folder_without_the_entry_ties_its_head_as_mlx_lm_does(tmp_path):
    folder = mlx_folder(tmp_path / "in", config=TIED)
    fields = json.loads((folder / "config.json").read_text())
    del fields["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(fields))
    model = formats.load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert formats.read_config(folder).tie_word_embeddings


def test_a_folder_of_several_files_is_read(tmp_path):
    folder, split = mlx_folder(tmp_path / "in", MIXED), tmp_path / "split"
    tensors = load_file(folder / "model.safetensors")
    split.mkdir()
    shutil.copyfile(folder / "config.json", split / "config.json")
    listed = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(listed.values()):
        save_file({name: t for name, t in tensors.items() if listed[name] == file}, split / file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    one, several = formats.load_model(folder), formats.load_model(split)
    assert np.array_equal(our_logits(one), our_logits(several))
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: no such file"):
        formats.load_model(split)


def test_our_own_folders_and_float_ones_are_not_taken_for_mlx(folder_of, tmp_path):
    assert formats.format_of(folder_of()) is quantized
    save_pretrained(Llama(CONFIG), tmp_path)
    assert formats.format_of(tmp_path) is formats.huggingface


# ---- what is no such folder


@given(
    st.integers(1, 2),
    st.integers(1, 40).map(lambda n: n * 32),
    st.integers(1, 320),
    st.sampled_from([1, 2, 3, 4, 8, 33]),
    st.booleans(),
)
@settings(max_examples=300)
@example(1, 1088, 136, 33, True)  # 1088 is 33 * 32 and a rest
@example(1, 64, 8, 2, False)
def test_shapes_tell_bits_and_groups_or_are_refused(rows, inputs, words, groups, alike):
    shapes = {"weight": (rows, words), "scales": (rows, groups), "biases": (rows, groups + 1)}
    if alike:
        shapes["biases"] = rows, groups
    found = {f"x.{n}": Stored(pathlib.Path("f"), f"x.{n}", s, None) for n, s in shapes.items()}
    possible = [
        (b, g)
        for b, g in itertools.product((1, 2, 3, 4, 5, 6, 8), (32, 64, 128))
        if words * 32 == inputs * b and groups * g == inputs and alike
    ]
    if possible:
        assert [mlx.kind_of(found, "x", (rows, inputs))] == possible
    else:
        with pytest.raises(UserError, match="f: .*x.weight.* cannot hold"):
            mlx.kind_of(found, "x", (rows, inputs))


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    return mlx_folder(tmp_path_factory.mktemp("mlx") / "in", MIXED)


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_unknown_folder_is_one_error(good_folder, tmp_path, name):
    folder, (change, said) = shutil.copytree(good_folder, tmp_path / "in"), BAD[name]
    change(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=said) as e:
        formats.import_base(folder, tmp_path / "out")
    assert str(folder) in str(e.value) and "\n" not in str(e.value)
    assert not list((tmp_path / "out").iterdir())


def test_layers_without_2_to_4_bits_are_refused(tmp_path):
    kinds = {name: (8, 32) for name, _ in linears(Llama(CONFIG))}
    with pytest.raises(UserError, match="no linear layer has 2, 3 or 4 bits"):
        formats.check(mlx_folder(tmp_path / "in", kinds))


# ---- out


@pytest.mark.parametrize(
    "bits, group_size, becomes", [(4, 32, 32), (3, 64, 64), (2, 96, 32), (2, 256, 128)]
)
def test_an_exported_folder_has_the_same_numbers(folder_of, tmp_path, bits, group_size, becomes):
    width = {96: 192, 256: 256}.get(group_size, 64)
    config = dataclasses.replace(
        CONFIG, hidden_size=width, intermediate_size=2 * width, head_dim=width // 4
    )
    folder = folder_of(bits, group_size, config)
    told, out = export.export_mlx(folder, tmp_path / "out"), FromFolder(tmp_path / "out")
    assert out.config["quantization"] == {"group_size": becomes, "bits": bits}
    assert out.config["quantization"] == out.config["quantization_config"]
    model = formats.load_model(folder)
    for name, layer in linears(model):
        words, scales = (out.tensors[f"{name}.{part}"] for part in ("weight", "scales"))
        assert words.shape == (layer.out_features, layer.in_features * bits // 32)
        assert scales.shape == (layer.out_features, layer.in_features // becomes)
        assert relative(layer.dequantize().double().numpy(), out.weight(name)) < 1e-7
    assert torch.equal(out.tensors["lm_head.weight"], model.lm_head.weight)
    assert relative(our_logits(model), out.logits(TOKENS)) < 1e-5
    assert any(f"groups of {group_size} became" in line for line in told) == (becomes != group_size)
    assert any("float32, and none is rounded" in line for line in told)
    again = formats.load_model(tmp_path / "out")
    assert np.array_equal(our_logits(again), our_logits(model))


def test_mixed_layers_and_tied_ones_are_exported(tmp_path, base_of):
    base = base_of(mlx_folder(tmp_path / "in", MIXED, config=TIED, dtype=mx.float16))
    forget_rest(base)
    export.export_mlx(base, tmp_path / "out")
    out = FromFolder(tmp_path / "out")
    entry = out.config["quantization"]
    assert entry[Q] == {"bits": 3, "group_size": 64} and entry[DOWN] is False
    assert out.tensors[f"{Q}.scales"].dtype == torch.float16  # they and all biases are exact
    assert "lm_head.weight" not in out.tensors and out.config["tie_word_embeddings"] is True
    model = formats.load_model(base)
    assert relative(our_logits(model), out.logits(TOKENS)) < 1e-5
    export.export_mlx(base, tmp_path / "wide", "f32")
    assert FromFolder(tmp_path / "wide").tensors[f"{Q}.scales"].dtype == torch.float32
    assert formats.format_of(tmp_path / "out") is mlx
    assert np.array_equal(our_logits(formats.load_model(tmp_path / "out")), our_logits(model))


def test_rounding_to_float16_is_reported_in_steps(folder_of, tmp_path):
    folder = folder_of()
    model = formats.load_model(folder)
    layer = model.get_submodule(Q)
    layer.scale = layer.scale.float() * -(1 + 2**-13)  # between two numbers of float16
    save_quantized(model, folder)
    told = export.export_mlx(folder, tmp_path / "half", "f16")
    out, moved = FromFolder(tmp_path / "half"), []
    for name, layer in linears(model):
        assert out.tensors[f"{name}.scales"].dtype == torch.float16
        d_scale = out.tensors[f"{name}.scales"].double() - layer.scale.double()
        d_offset = out.tensors[f"{name}.biases"].double() - layer.offset.double()
        ends = torch.stack([d_offset, d_offset + 15 * d_scale]).abs().amax(0)
        moved.append((ends / layer.scale.double().abs()).flatten())
    moved = torch.cat(moved)
    assert (
        f"by {moved.mean():.2g} of a quantization step on average, {moved.max():.2g} at" in told[1]
    )
    told = export.export_mlx(folder, tmp_path / "whole", "f32")
    assert "float32, and none is rounded" in told[1]


def test_what_float16_cannot_hold_is_refused_and_nothing_is_left(folder_of, tmp_path):
    folder = folder_of()
    model = formats.load_model(folder)
    model.get_submodule(V).offset[3, 1] = -7e4
    save_quantized(model, folder)
    with pytest.raises(UserError, match=f"{V}: 70000 is beyond torch.float16"):
        export.export_mlx(folder, tmp_path / "out", "f16")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    export.export_mlx(folder, tmp_path / "out")


def test_an_option_of_the_other_format_is_refused(folder_of, tmp_path, run):
    for name, option in (("out.gguf", "--scales"), ("out", "--embeddings")):
        with pytest.raises(UserError, match=f"{option} is for an? "):
            run(export, folder_of(name=name + "in"), "--out", tmp_path / name, option, "f32")
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match="config.json: found none of run.json"):
        run(export, tmp_path / "outin" / "config.json", "--out", tmp_path / "out")


def test_groups_that_mlx_lacks_and_float_models_are_refused(folder_of, tmp_path):
    with pytest.raises(UserError, match="q_proj: groups of 16 do not fill blocks of 32 weights"):
        export.export_mlx(folder_of(4, 16), tmp_path / "out")
    folder = tmp_path / "float"
    folder.mkdir()
    save_pretrained(Llama(CONFIG), folder)
    shutil.copyfile(tmp_path / "model" / "tokenizer.model", folder / "tokenizer.model")
    with pytest.raises(UserError, match="no layer is quantized in groups"):
        export.export_mlx(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_says_what_transformers_has_to_be_told(folder_of, tmp_path):
    folder = folder_of()
    tokenizer = load_tokenizer(folder)
    in_json = dataclasses.replace(tokenizer, files={JSON: b"{}"}, bos=())  # tokenizer.json's kind
    (tmp_path / "json").mkdir()
    mlx.write_tokenizer(in_json, tmp_path / "json")
    said = json.loads((tmp_path / "json" / "tokenizer_config.json").read_text())
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    assert said == ends | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "x": 1}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    export.export_mlx(folder, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said == ends | {"x": 1, "add_bos_token": True}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 5]
    ours, theirs = load_tokenizer(folder), load_tokenizer(tmp_path / "out")
    assert (theirs.bos, theirs.stops) == (ours.bos, ours.stops)


# ---- in, trained, and back


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_not_trained_comes_back_byte_for_byte(tmp_path, base_of, dtype):
    source = mlx_folder(tmp_path / "in", MIXED, dtype=DTYPES[dtype])
    base = base_of(source)
    export.export_mlx(base, tmp_path / "same")
    before, same = FromFolder(source), FromFolder(tmp_path / "same")
    assert before.tensors.keys() == same.tensors.keys()
    for name, tensor in before.tensors.items():
        assert as_bytes(tensor) == as_bytes(same.tensors[name]), name
    texts = [(path / "config.json").read_text() for path in (source, tmp_path / "same")]
    assert texts[0] == texts[1]
    model = tune(formats.load_model(base, torch.float32), ["q_proj"])
    adapted = our_logits(model)
    merged = merge.merge(model)
    assert np.array_equal(our_logits(merged), adapted)
    save_quantized(merged, base, mlx.FLOATS[dtype])
    told = export.export_mlx(base, tmp_path / "tuned")
    tuned = FromFolder(tmp_path / "tuned")
    changed = [f"model.layers.{i}.self_attn.q_proj.biases" for i in (0, 1)]
    for name, tensor in before.tensors.items():
        if name in changed:
            assert tuned.tensors[name].dtype == torch.float32
            assert not torch.equal(tuned.tensors[name], tensor.float())
        else:
            assert as_bytes(tensor) == as_bytes(tuned.tensors[name]), name
    assert "none is rounded" in told[1] and tuned.config == before.config
    again = formats.load_model(tmp_path / "tuned", torch.float32)
    assert np.array_equal(our_logits(again), our_logits(formats.load_model(base, torch.float32)))
    told = export.export_mlx(base, tmp_path / "half", "f16")
    half = FromFolder(tmp_path / "half")
    assert "float16, whose rounding moves weights by" in told[1]
    export.export_mlx(base, tmp_path / "whole", "f32")
    whole = FromFolder(tmp_path / "whole")
    in_groups = {name for name, layer in linears(merged) if isinstance(layer, QuantLinear)}
    for name, tensor in tuned.tensors.items():
        module, _, part = name.rpartition(".")
        chosen = module in in_groups and part != "weight"
        for out, kind in ((half, torch.float16), (whole, torch.float32)):
            wanted = tensor.to(kind) if chosen else tensor
            assert as_bytes(out.tensors[name]) == as_bytes(wanted), name


def test_train_py_starts_from_a_folder_of_mlx_and_again_from_what_became_of_it(
    tmp_path, tokenizer_file, run, capsys
):
    config = dataclasses.replace(CONFIG, max_position_embeddings=512)  # room for Alpaca's words
    source = mlx_folder(tmp_path / "in", MIXED, config)
    shutil.copyfile(tokenizer_file, source / "tokenizer.model")
    data = [json.dumps({"instruction": text, "output": text}) for text in TEXTS * 2]
    (tmp_path / "data.jsonl").write_text("\n".join(data))
    words = ["--data", tmp_path / "data.jsonl", "--steps", 1, "--batch-size", 2, "--rank", 2]
    words += ["--targets", "v_proj,k_proj", "--lr", 0.05]
    run(train, "--weights", source, "--out", tmp_path / "run0", *words)
    run(train, "--weights", tmp_path / "run0", "--out", tmp_path / "run1", *words)
    capsys.readouterr()
    run(export, tmp_path / "run1", "--out", tmp_path / "out")
    assert f"wrote {tmp_path / 'out'}, 0." in capsys.readouterr().out
    before, after = FromFolder(source), FromFolder(tmp_path / "out")
    trained = [n for n in before.tensors if n.split(".")[-2] in ("v_proj", "k_proj")]
    trained = [name for name in trained if name.endswith("biases")]
    for name, tensor in before.tensors.items():
        same = as_bytes(tensor) == as_bytes(after.tensors[name])
        assert same == (name not in trained), name
    for name, layer in linears(formats.load_model(tmp_path / "run1")):
        if name.endswith(("v_proj", "k_proj")):
            assert torch.equal(after.tensors[f"{name}.scales"].float(), layer.scale.float()), name
    run(export, tmp_path / "run1", "--out", tmp_path / "half", "--scales", "f16")
    assert FromFolder(tmp_path / "half").tensors[trained[0]].dtype == torch.float16
    assert (tmp_path / "out" / CHAT_TEMPLATE).read_text() == load_tokenizer(
        tmp_path / "run1" / "base"
    ).alpaca_template


def test_a_model_that_came_from_mlx_goes_into_gguf(tmp_path, base_of):
    pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    kinds = {"model.embed_tokens": None, "lm_head": (6, 64), Q: (2, 64), V: (3, 32)}
    base = base_of(mlx_folder(tmp_path / "in", kinds, dtype=mx.float16))
    export.export(base, tmp_path / "out.gguf")  # nothing rounds: all is float16
    found = our_logits(formats.load_model(tmp_path / "out.gguf"))
    assert np.array_equal(found, our_logits(formats.load_model(base)))


def test_what_was_kept_of_a_folder_and_is_damaged_since_is_refused(tmp_path, base_of):
    base = base_of(mlx_folder(tmp_path / "in"))
    kept, whole = base / MLX_REST, (base / MLX_REST).read_bytes()
    tensors = load_file(kept)
    with safe_open(kept, framework="pt") as file:
        layout = json.loads(file.metadata()["layout"])
    first = next(iter(layout["dtypes"]))
    less = {name: pair for name, pair in layout["dtypes"].items() if name != first}
    for changes in (
        {"config": None},
        {"config": "{}"},
        {"config": layout["config"].replace("affine", "mxfp4")},
        {"config": layout["config"].replace('"hidden_size": 64', '"hidden_size": 32')},
        {"dtypes": less},
        {"dtypes": [1]},
        {"dtypes": {**less, first: []}},
        {"dtypes": {**less, first: ["float16"] * 3}},
        {"dtypes": {**less, first: [[1], 2]}},
        {"config": layout["config"].replace('"rms_norm_eps": ', '"rms_norm_eps": 1')},
        {"dtypes": {**less, first: "bfloat16"}},
        {"dtypes": {**less, first: ["x", "bfloat16"]}},
        {"tensors": layout["tensors"][1:]},
        None,
    ):
        metadata = {"layout": json.dumps(layout | changes)} if changes else None
        save_file(tensors, kept, metadata=metadata)
        with pytest.raises(UserError, match="mlx.safetensors is missing, damaged, or of another"):
            export.export_mlx(base, tmp_path / "out")
    for name in tensors:
        less = {other: t for other, t in tensors.items() if other != name}
        rest = {"layout": json.dumps(layout | {"tensors": sorted(less)})}
        save_file(less, kept, metadata=rest)
        with pytest.raises(UserError, match="mlx.safetensors is missing, damaged, or of another"):
            export.export_mlx(base, tmp_path / "out")
    kept.write_bytes(whole[:-50])
    with pytest.raises(UserError, match="mlx.safetensors is missing, damaged, or of another"):
        export.export_mlx(base, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "base"}
