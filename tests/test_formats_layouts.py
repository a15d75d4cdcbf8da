"""Every layout of float weights loads to the same tensors, from the memory map of its files."""

import dataclasses
import json
import pathlib

import pytest
import torch
from helpers import (
    DTYPES,
    SEEDS,
    SMALL,
    close,
    configs,
    random_model,
    random_tokens,
    reference_logits,
)
from helpers_checkpoints import (
    HF_LAYOUTS,
    LAYOUTS,
    change,
    rewrite,
    shards_of,
    write_checkpoint,
    write_hf,
    write_meta,
)
from hypothesis import given
from hypothesis import strategies as st

import llama
from cli.errors import UserError
from formats import open_weights, read_config
from formats.files import fill, weight_files, write_config
from formats.huggingface import save_pretrained
from llama import Llama, LlamaConfig, load_pretrained


@given(data=st.data(), seed=SEEDS, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_every_layout_loads_to_the_same_tensors(tmp_path_factory, data, seed, dtype, layout):
    shards = shards_of(layout)
    config = data.draw(configs(kv_heads=shards, old=bool(shards)))
    if shards:
        config = dataclasses.replace(
            config, max_position_embeddings=2048
        )  # Meta's file says nothing of it
    folder = tmp_path_factory.mktemp("layout")
    model = random_model(config, seed).to(dtype)
    write_checkpoint(folder, model, layout)
    loaded = load_pretrained(folder)
    assert loaded.config == config == read_config(folder)
    expected, actual = model.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    for name in expected:
        assert actual[name].dtype == dtype and torch.equal(actual[name], expected[name]), name
    if config.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in loaded.parameters())


@given(data=st.data(), seed=SEEDS, shards=st.sampled_from([1, 2, 4]))
def test_metas_weights_give_the_logits_of_metas_interleaved_rotary_formula(
    tmp_path_factory, data, seed, shards
):
    config = data.draw(configs(kv_heads=shards, tied=st.just(False), old=True))
    folder = tmp_path_factory.mktemp("meta")
    tensors = {name: p.detach() for name, p in random_model(config, seed).named_parameters()}
    write_meta(folder, tensors, config, shards)
    tokens = random_tokens(config, 1, 7, seed)
    with torch.no_grad():
        logits = load_pretrained(folder, torch.float64)(tokens)[0]
    assert close(logits, reference_logits(tensors, config, tokens[0].tolist(), interleaved=True))


@given(data=st.data(), layout=st.sampled_from([layout for layout in LAYOUTS if "meta" in layout]))
def test_metas_head_that_is_the_embedding_again_is_tied_to_it(tmp_path_factory, data, layout):
    shards, folder = shards_of(layout), tmp_path_factory.mktemp("tied")
    model = random_model(data.draw(configs(kv_heads=shards, tied=st.just(True), old=True)))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    changed = data.draw(st.booleans())
    if changed:
        tensors["lm_head.weight"][-1, -1] += 1  # of the last shard
    write_meta(folder, tensors, model.config, shards, layout.endswith("rows"))
    loaded = load_pretrained(folder)
    # split by rows and by columns, two parts cannot be compared: then both are kept
    comparable = layout in ("meta1", "meta2rows")
    assert loaded.config.tie_word_embeddings == (comparable and not changed)
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


@given(configs(), SEEDS, st.sampled_from(DTYPES))
def test_what_is_saved_is_what_loads(tmp_path_factory, config, seed, dtype):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "tokenizer.model").write_text("stays")
    model = random_model(config, seed).to(dtype)
    save_pretrained(model, folder)
    loaded = load_pretrained(folder)
    assert loaded.config == config
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    save_pretrained(loaded, folder)  # over the very file its weights are mapped from
    assert torch.equal(load_pretrained(folder).model.norm.weight, model.model.norm.weight)


def test_a_written_config_says_what_was_added_to_it_and_reads_back(tmp_path):
    write_config(SMALL, tmp_path / "new", extra={"quantization": {"bits": 3}})
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization"] == {"bits": 3}
    assert read_config(tmp_path / "new") == SMALL


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_that_is_asked_for_casts_and_mixed_checkpoints_become_one_dtype(tmp_path, dtype):
    model = random_model(SMALL)
    tensors = {
        name: p.detach().to(torch.float32 if "norm" in name else torch.float16)
        for name, p in model.named_parameters()
    }
    write_hf(tmp_path, tensors, SMALL)
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.float16}
    loaded = load_pretrained(tmp_path, dtype=dtype)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, tensors[name].to(dtype)), name


def test_one_block_is_filled_alone_from_the_memory_map(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "one.safetensors")
    config, weights = open_weights(tmp_path)
    with torch.device("meta"):
        block = llama.Block(config)
    fill(block, weights, prefix="model.layers.1.")
    for name, p in model.model.layers[1].named_parameters():
        assert torch.equal(block.get_parameter(name), p)


@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_loading_maps_the_files_and_copies_nothing(tmp_path, layout):
    def anonymous():
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    config = LlamaConfig(2**14, 2**10, 4, 1, 1, 1, tie_word_embeddings=True)  # embedding: 64 MB
    write_checkpoint(tmp_path, Llama(config), layout)
    before = anonymous()
    model = load_pretrained(tmp_path)
    assert anonymous() - before < 2**23
    assert model.model.embed_tokens.weight.nbytes == 2**26


def test_a_pickle_of_before_pytorch_1_6_is_read(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "one.bin")
    torch.save(
        model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    read = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], t) for name, t in model.state_dict().items())


def test_frequencies_that_old_checkpoints_store_are_passed_over(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "one.bin")
    rewrite(
        tmp_path / "pytorch_model.bin",
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
        ),
    )
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_tensor_is_read_only_when_its_function_is_called(tmp_path):
    write_checkpoint(tmp_path, random_model(SMALL), "many.safetensors")
    for path in weight_files(tmp_path):
        rewrite(
            path,
            lambda tensors: [
                change(tensors, name, "nan") for name in tensors if "layers.1" in name
            ],
        )
    _, weights = open_weights(tmp_path)
    assert weights["model.layers.0.mlp.up_proj.weight"]().isfinite().all()
    with pytest.raises(UserError, match="tensor model.layers.1.mlp.up_proj.weight has NaN"):
        weights["model.layers.1.mlp.up_proj.weight"]()


def test_float64_is_read_and_hidden_files_are_no_weights(tmp_path):
    model = random_model(SMALL).double()
    write_checkpoint(tmp_path, model, "one.safetensors")
    (tmp_path / "._model.safetensors").write_bytes(b"macOS")
    assert all(map(torch.equal, load_pretrained(tmp_path).parameters(), model.parameters()))
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]
