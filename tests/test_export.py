"""What export.py promises: a GGUF file says all there is to say."""

import dataclasses
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from fixtures_gguf import CONFIG, LINEAR, LLAMA3, TEXTS, TIED, WIDE_HEADS
from helpers_gguf import (
    MANY_TOKENS,
    TEMPLATE,
    TOKENS,
    FromFile,
    Type,
    assert_only_offsets_differ,
    imported,
    kind_of,
    our_logits,
    quantize_file,
    relative_error,
    rope_freqs,
    run_of,
)
from safetensors.torch import load_file, save_file

import export
import formats
import merge
import train
from cli.errors import UserError
from formats import load_model
from formats.groups import layers_in_groups
from formats.huggingface import save_pretrained
from formats.quantized import save_quantized
from formats.rest import GGUF_REST
from llama import Llama
from text.tokenizer import CHAT_TEMPLATE, load_tokenizer


def test_the_file_has_every_hyperparameter(folder_of, tmp_path):
    export.export(folder_of(), tmp_path / "m.gguf")
    metadata = FromFile(tmp_path / "m.gguf").metadata
    expected = {
        "general.architecture": "llama",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 77,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": np.float32(3e-5),
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 300,
    }
    assert {key: metadata.get(key) for key in expected} == expected


def test_the_file_has_the_vocabulary_and_fills_it_up_to_the_embedding(
    folder_of, tmp_path, tokenizer_file
):
    export.export(folder_of(), tmp_path / "m.gguf")
    metadata = FromFile(tmp_path / "m.gguf").metadata
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    kind = [kind_of(ours, i) for i in range(296)]
    assert metadata["tokenizer.ggml.tokens"] == [ours.id_to_piece(i) for i in range(296)] + [
        "[PAD296]",
        "[PAD297]",
        "[PAD298]",
        "[PAD299]",
    ]
    assert (
        metadata["tokenizer.ggml.scores"]
        == [ours.get_score(i) for i in range(296)] + [-10000.0] * 4
    )
    assert metadata["tokenizer.ggml.token_type"] == kind + [5] * 4 and kind[:4] == [2, 3, 3, 6]
    expected = {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    }
    assert {key: metadata.get(f"tokenizer.ggml.{key}") for key in expected} == expected


@pytest.mark.parametrize(
    "embeddings, kind", [(None, Type.F16), ("f16", Type.F16), ("f32", Type.F32)]
)
def test_the_file_has_every_tensor_in_its_type_and_shape(folder_of, tmp_path, embeddings, kind):
    export.export(folder_of(), tmp_path / "m.gguf", embeddings)
    tensors = FromFile(tmp_path / "m.gguf").tensors
    found = {name: (t.tensor_type, *reversed(t.shape.tolist())) for name, t in tensors.items()}
    expected = {
        "token_embd": (kind, 300, 64),
        "output": (kind, 300, 64),
        "output_norm": (Type.F32, 64),
    }
    for i in range(2):
        expected |= {
            f"blk.{i}.{name}": value
            for name, value in {
                "attn_norm": (Type.F32, 64),
                "ffn_norm": (Type.F32, 64),
                "attn_q": (Type.Q4_1, 64, 64),
                "attn_k": (Type.Q4_1, 32, 64),
                "attn_v": (Type.Q4_1, 32, 64),
                "attn_output": (Type.Q4_1, 64, 64),
                "ffn_gate": (Type.Q4_1, 96, 64),
                "ffn_up": (Type.Q4_1, 96, 64),
                "ffn_down": (Type.Q4_1, 64, 96),
            }.items()
        }
    assert found == {f"{name}.weight": value for name, value in expected.items()}


@pytest.mark.parametrize("config", [WIDE_HEADS, LINEAR, LLAMA3])
def test_a_newer_llama_follows_from_the_file_alone_and_is_read_back(folder_of, tmp_path, config):
    folder, file = folder_of(config=config), tmp_path / "m.gguf"
    export.export(folder, file, "f32")
    logits = our_logits(folder, MANY_TOKENS)
    assert relative_error(FromFile(file).logits(MANY_TOKENS), logits) < 5e-3
    kept = float(np.float32(config.rms_norm_eps))
    assert formats.read_config(file) == dataclasses.replace(config, rms_norm_eps=kept)
    with torch.no_grad():
        again = load_model(file, torch.float32)(torch.tensor([MANY_TOKENS]))[0].double().numpy()
    assert relative_error(again, logits) < 5e-3


def test_rope_freqs_are_those_that_llama_cpp_writes(folder_of, tmp_path):
    export.export(folder_of(config=LLAMA3), tmp_path / "m.gguf")
    tensors = FromFile(tmp_path / "m.gguf").tensors
    assert next(iter(tensors)) == "rope_freqs.weight"
    found, divisors = tensors["rope_freqs.weight"].data, rope_freqs(LLAMA3)
    assert found.dtype == np.float32 and np.allclose(found, divisors, rtol=1e-6, atol=0)
    assert len(found) == 12 and {1.0, 32.0} < set(found.tolist())


def test_tied_embeddings_are_stored_once(folder_of, tmp_path):
    folder = folder_of(config=TIED)
    export.export(folder, tmp_path / "m.gguf", "f32")
    file = FromFile(tmp_path / "m.gguf")
    assert "output.weight" not in file.tensors and "token_embd.weight" in file.tensors
    assert relative_error(file.logits(TOKENS), our_logits(folder, TOKENS)) < 5e-3


@pytest.mark.parametrize("bits, group_size", [(4, 32), (3, 32), (2, 32), (4, 96), (2, 64)])
def test_the_logits_follow_from_the_file_alone(folder_of, tmp_path, bits, group_size):
    width = 192 if group_size == 96 else 64
    config = dataclasses.replace(
        CONFIG, intermediate_size=192, hidden_size=width, head_dim=width // 4
    )
    folder = folder_of(bits, group_size, config)
    model = load_model(folder)
    for layer in layers_in_groups(model).values():
        layer.offset = layer.offset.half().float()  # so that nothing rounds
    save_quantized(model, folder)
    told = export.export(folder, tmp_path / "m.gguf", "f32")
    assert (
        relative_error(FromFile(tmp_path / "m.gguf").logits(TOKENS), our_logits(folder, TOKENS))
        < 2e-5
    )
    assert any(f"{bits}-bit codes take 4 bits" in line for line in told) == (bits < 4)
    assert any(f"groups of {group_size} became blocks" in line for line in told) == (
        group_size > 32
    )
    assert any("float16, and none is rounded" in line for line in told)


def test_rounding_the_offsets_hardly_shows_in_the_logits(folder_of, tmp_path):
    folder = folder_of()
    export.export(folder, tmp_path / "m.gguf", "f16")
    assert (
        1e-6
        < relative_error(FromFile(tmp_path / "m.gguf").logits(TOKENS), our_logits(folder, TOKENS))
        < 5e-3
    )


def test_a_run_exports_like_the_model_merged_from_it(folder_of, tmp_path, run):
    finished = run_of(folder_of(), tmp_path / "run")
    run(merge, finished, "--out", tmp_path / "merged")
    export.export(finished, tmp_path / "a.gguf")
    export.export(tmp_path / "merged", tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_command_says_what_it_wrote(folder_of, tmp_path, run, capsys):
    run(export, folder_of(bits=2), "--out", tmp_path / "m.gguf")
    told = capsys.readouterr().out
    assert (
        f"wrote {tmp_path / 'm.gguf'}" in told
        and "of a quantization step" in told
        and "2-bit codes" in told
    )


def test_a_disk_that_is_full_leaves_nothing(folder_of, tmp_path):
    folder, out = folder_of(), tmp_path / "out"
    out.mkdir()

    def limit():
        return resource.setrlimit(
            resource.RLIMIT_FSIZE, (50_000, 50_000)
        )  # files end there as on a full disk

    done = subprocess.run(
        [sys.executable, export.__file__, folder, "--out", out / "m.gguf"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: File too large")
        and done.stderr.count("\n") == 1
    )
    assert not list(out.iterdir())


def test_what_exists_is_not_overwritten(folder_of, tmp_path, run):
    folder = folder_of()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "empty.gguf").mkdir()
    for path, said in (
        (folder / "config.json", "exists and is no empty folder"),
        (folder, "exists and is no empty folder"),
        (tmp_path / "empty.gguf", "is a folder; name the file"),
    ):
        with pytest.raises(UserError, match=said):
            run(export, folder, "--out", path)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "group_size, said", [(16, "groups of 16 do not fill"), (8, "multiple of 32")]
)
def test_groups_that_are_no_multiple_of_32_are_refused(folder_of, tmp_path, group_size, said):
    with pytest.raises(UserError, match=f"model.layers.0.self_attn.q_proj: .*{said}"):
        export.export(folder_of(4, group_size), tmp_path / "m.gguf")


def test_a_float_model_is_refused(tmp_path):
    save_pretrained(Llama(CONFIG), tmp_path)
    with pytest.raises(UserError, match="no layer is quantized in groups"):
        export.export(tmp_path, tmp_path / "m.gguf")


def test_offsets_and_embeddings_beyond_float16_are_refused(folder_of, tmp_path):
    folder = folder_of()
    model = load_model(folder)
    model.lm_head.weight[3, 4] = 1e5
    save_quantized(model, folder)
    with pytest.raises(UserError, match="lm_head.weight has values .* --embeddings f32"):
        export.export(folder, tmp_path / "m.gguf")
    export.export(folder, tmp_path / "m.gguf", "f32")
    model.model.layers[1].mlp.up_proj.offset[3, 1] = -7e4
    save_quantized(model, folder)
    with pytest.raises(
        UserError, match="model.layers.1.mlp.up_proj: 70000 is beyond torch.float16"
    ):
        export.export(folder, tmp_path / "n.gguf")
    assert not list(tmp_path.glob("*n.gguf*"))


def test_the_type_of_embeddings_that_came_from_a_file_cannot_be_chosen(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file))
    folder = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base")
    with pytest.raises(UserError, match="leave out --embeddings"):
        export.export(folder, tmp_path / "out.gguf", "f16")


@pytest.mark.parametrize("template", ["x", "é{{ messages }}" * 40, TEMPLATE, None])
@pytest.mark.parametrize("had_one", [True, False])
def test_the_chat_template_of_a_run_takes_the_place_of_the_files_own_and_nothing_else_changes(
    tmp_path, tokenizer_file, template, had_one
):
    def change(metadata, tensors):
        if not had_one:
            del metadata["tokenizer.chat_template"]

    file, folder = tmp_path / "in.gguf", tmp_path / "base"
    quantize_file(file, CONFIG, load_tokenizer(tokenizer_file), change=change)
    imported(file, tokenizer_file, folder)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template)
    export.export(folder, tmp_path / "out.gguf")
    before, after = FromFile(file), FromFile(tmp_path / "out.gguf")
    if template is not None:
        before.metadata["tokenizer.chat_template"] = template
        before.metadata["GGUF.kv_count"] += not had_one
    assert after.metadata == before.metadata and after.raw == before.raw
    if template in (TEMPLATE if had_one else None, None):
        assert (tmp_path / "out.gguf").read_bytes() == file.read_bytes()


def test_the_end_of_a_turn_that_llama_cpp_does_not_know_goes_into_the_file_too(
    tmp_path, tokenizer_file
):
    file, folder = tmp_path / "in.gguf", tmp_path / "base"
    tokenizer = load_tokenizer(tokenizer_file)
    quantize_file(file, CONFIG, tokenizer)
    imported(file, tokenizer_file, folder)
    added = {"299": {"content": "<|mine|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|mine|>' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    load_tokenizer(folder).with_template(source).save(folder)
    assert load_tokenizer(folder).stops == (2, 299)
    export.export(folder, tmp_path / "out.gguf")
    before, after = FromFile(file), FromFile(tmp_path / "out.gguf")
    before.metadata |= {"tokenizer.chat_template": source, "tokenizer.ggml.eot_token_id": 299}
    before.metadata["GGUF.kv_count"] += 1
    assert after.metadata == before.metadata and after.raw == before.raw


def test_what_was_kept_of_a_file_and_is_damaged_since_is_refused(tmp_path, tokenizer_file):
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file))
    kept = imported(tmp_path / "in.gguf", tokenizer_file, tmp_path / "base") / GGUF_REST
    whole, tensors = kept.read_bytes(), {name: t.clone() for name, t in load_file(kept).items()}
    kept.write_bytes(whole[:5000])
    with pytest.raises(UserError, match="gguf.safetensors is missing, damaged, or of another"):
        export.export(tmp_path / "base", tmp_path / "out.gguf")
    save_file(tensors, kept)  # without what stands beside the tensors
    with pytest.raises(UserError, match="gguf.safetensors is missing, damaged, or of another"):
        export.export(tmp_path / "base", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


def test_without_the_gguf_package_one_line_names_it(folder_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        export.export(folder_of(), tmp_path / "m.gguf")


def test_train_py_starts_from_a_gguf_file_and_again_from_what_became_of_it(
    tmp_path, tokenizer_file, run
):
    quantize_file(tmp_path / "in.gguf", CONFIG, load_tokenizer(tokenizer_file))
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in TEXTS * 4)
    )
    words = [
        "--data",
        tmp_path / "data.jsonl",
        "--steps",
        2,
        "--batch-size",
        2,
        "--rank",
        2,
        "--lr",
        0.01,
    ]
    first = ["--weights", tmp_path / "in.gguf", "--out", tmp_path / "run0"]
    run(train, *first, *words)
    run(merge, tmp_path / "run0", "--out", tmp_path / "merged")
    run(train, "--weights", tmp_path / "merged", "--out", tmp_path / "run1", *words)
    run(export, tmp_path / "run1", "--out", tmp_path / "out.gguf")
    assert_only_offsets_differ(FromFile(tmp_path / "in.gguf"), FromFile(tmp_path / "out.gguf"))
