"""Every kind of foreign model goes the whole way: train.py, the same bits, merged, out again."""

import json
import shutil
import types

import pytest
import safetensors.torch
import torch
from helpers import codes_of, linears
from helpers_gptq import Folder
from helpers_runs import CONFIG

import export
import formats
import merge
import train
from cli.base import base_bytes
from llama import Llama
from quant import QuantLinear
from text.tokenizer import load_tokenizer


def write_gptq(path, tokenizer):
    """Scales that float16 does not hold, other bits and groups in two layers, a float layer."""
    kinds = {"v_proj": (2, 16), "up_proj": (3, 64), "o_proj": None, "lm_head": (4, 32)}
    folder = Folder(config=CONFIG, group_size=32, dtype=torch.bfloat16, **kinds)
    folder.write(path)
    tokenizer.save(path)


def write_q4_k(path, tokenizer, **more):
    """Q4_K, Q4_0 and Q4_1, and two layers in types that stay as they are."""
    pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    import dataclasses  # beside the next, which needs the package

    from helpers_gguf import Type, quantize_file

    wide = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=256, head_dim=64)
    mixed = {"attn_q": Type.Q4_K, "ffn_up": Type.Q4_K, "attn_k": Type.Q4_0}
    mixed |= {"attn_v": Type.Q6_K, "0.ffn_down": Type.Q5_K, **more}
    quantize_file(path, wide, tokenizer, Type.Q6_K, mixed=mixed)


SOURCES = {"GPTQ": ("gptq", write_gptq), "Q4_K": ("model.gguf", write_q4_k)}


def codes(model):
    found = {}
    for name, layer in linears(model).items():
        if isinstance(layer, QuantLinear):
            found[name] = codes_of(layer)
    return found


@pytest.mark.parametrize("kind", SOURCES)
def test_a_foreign_model_is_tuned_to_equal_bits_twice_and_exported(
    world, tmp_path, run, capsys, kind
):
    name, write = SOURCES[kind]
    source = tmp_path / name
    write(source, load_tokenizer(world / "weights"))
    words = ["--data", world / "records.json", "--steps", 2, "--batch-size", 2, "--rank", 2]
    words += ["--lr", 0.01, "--max-length", 64]
    run(train, "--weights", source, "--out", tmp_path / "run0", *words)
    assert "layers stay frozen in float" in capsys.readouterr().out
    run(train, "--weights", tmp_path / "run0", "--out", tmp_path / "run1", *words)
    for part in ("run0", "run1"):
        assert json.loads((tmp_path / part / "results.json").read_text())["bit_identical"] is True
    before, after = formats.load_model(source), formats.load_model(tmp_path / "run1")
    assert codes(after).keys() == codes(before).keys() and codes(before)
    for name, layer in linears(before).items():
        other = after.get_submodule(name)
        if not isinstance(layer, QuantLinear):
            assert torch.equal(layer.weight, other.weight), name
            continue
        assert torch.equal(codes(before)[name], codes(after)[name]), name
        assert torch.equal(layer.scale, other.scale) and layer.scale.dtype == other.scale.dtype
        assert not torch.equal(layer.offset, other.offset)
    if kind == "Q4_K":  # written back: also from a run over a run
        run(export, tmp_path / "run1", "--out", tmp_path / "out.gguf")
        again = formats.load_model(tmp_path / "out.gguf")
        for name, p in before.named_parameters():
            assert torch.equal(again.get_parameter(name), p), name
        assert all(torch.equal(codes(again)[name], codes(after)[name]) for name in codes(after))
        shutil.rmtree(tmp_path / "run1")
    else:  # its groups of 16 fit neither GGUF nor MLX
        with pytest.raises(formats.UserError, match="v_proj: groups of 16 do not fill blocks"):
            run(export, tmp_path / "run1", "--out", tmp_path / "out.gguf")


def test_a_gptq_model_of_fine_scales_goes_to_mlx_without_rounding(world, tmp_path, run, capsys):
    folder = Folder(config=CONFIG, group_size=32, dtype=torch.bfloat16, v_proj=(2, 32))
    source = folder.write(tmp_path / "gptq")
    load_tokenizer(world / "weights").save(source)
    run(export, source, "--out", tmp_path / "out")
    assert "are float32, and none is rounded" in capsys.readouterr().out
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, (parts, _, zeros) in folder.layers.items():
        scales = parts["scales"].t().float()
        assert torch.equal(tensors[f"{name}.scales"], scales)
        assert torch.equal(tensors[f"{name}.biases"], -scales * torch.tensor(zeros).t())


def write_wide_floats(path, tokenizer):
    """Embedding and head in float32, as then are all float parts of the base."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    float32 = gguf.GGMLQuantizationType.F32
    write_q4_k(path, tokenizer, token_embd=float32, output=float32)


@pytest.mark.parametrize(
    "name, write, most", [("gptq", write_gptq, 1.6), ("in.gguf", write_wide_floats, 1.2)]
)
def test_the_room_for_an_imported_base_is_estimated_a_little_above_what_it_takes(
    world, tmp_path, name, write, most
):
    source, folder = tmp_path / name, tmp_path / "base"
    write(source, load_tokenizer(world / "weights"))
    folder.mkdir()
    formats.import_base(source, folder)
    taken = 0
    for file in folder.glob("*.safetensors"):  # without headers: of so small a model they are much
        header = int.from_bytes(file.read_bytes()[:8], "little")
        taken += file.stat().st_size - header
    kept = formats.quantization_of(source)
    settings = types.SimpleNamespace(weights=str(source), method="qalora", **kept)
    with torch.device("meta"):
        model = Llama(formats.read_config(source))
    estimated = base_bytes(settings, model)
    assert taken < estimated < most * taken, (taken, estimated)


def test_what_is_in_the_format_already_is_not_exported_to_it(world, tmp_path, run, capsys):
    """It came from no run, so that nothing was kept of it, and what is written would be less."""
    write_q4_k(tmp_path / "in.gguf", load_tokenizer(world / "weights"))
    with pytest.raises(formats.UserError, match="in.gguf is what would be written already; name a"):
        run(export, tmp_path / "in.gguf", "--out", tmp_path / "out.GGUF")
    run(export, tmp_path / "in.gguf", "--out", tmp_path / "mlx")
    with pytest.raises(formats.UserError, match="mlx is what would be written already; name a run"):
        run(export, tmp_path / "mlx", "--out", tmp_path / "out")
    run(export, tmp_path / "mlx", "--out", tmp_path / "back.GGUF")
    assert (tmp_path / "back.GGUF").read_bytes()[:4] == b"GGUF"
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"in.gguf", "mlx", "back.GGUF"}


def test_what_a_base_has_kept_of_its_file_is_missed_where_it_is_lost(world, tmp_path, run):
    source, out = tmp_path / "in.gguf", tmp_path / "run"
    write_q4_k(source, load_tokenizer(world / "weights"))
    words = ["--data", world / "records.json", "--steps", 1, "--batch-size", 2, "--rank", 2]
    words += ["--max-length", 64, "--weights", source, "--out", out]
    run(train, *words)
    run(merge, out, "--out", tmp_path / "merged")
    run(export, tmp_path / "merged", "--out", tmp_path / "first.gguf")
    (tmp_path / "merged" / "gguf.safetensors").unlink()
    with pytest.raises(formats.UserError, match="merged/gguf.safetensors is missing, damaged, or"):
        run(export, tmp_path / "merged", "--out", tmp_path / "second.gguf")
    (out / "base" / "gguf.safetensors").unlink()
    run(train, *words)
    run(export, out, "--out", tmp_path / "second.gguf")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()
