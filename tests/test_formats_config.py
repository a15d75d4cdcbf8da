"""A config is read in all its forms, or refused by the name of what is not computed."""

import dataclasses

import pytest
import torch
from helpers import SMALL, random_model
from helpers_checkpoints import write_checkpoint, write_hf

import llama
from cli.errors import UserError
from formats import open_weights, read_config
from llama import load_pretrained


@pytest.mark.parametrize(
    "fields, attribute, value",
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": ...},
            "rope_theta",
            500.0,
        ),
        ({"rope_scaling": None, "rope_theta": 1e6}, "rope_theta", 1e6),
        (
            {"rope_theta": ..., "num_key_value_heads": ..., "rms_norm_eps": ...},
            "rope_theta",
            10000.0,
        ),
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"quantization": {"bits": 4, "group_size": 32}}, "hidden_size", 16),
        (
            {
                "head_dim": 4,
                "attention_bias": False,
                "use_cache": True,
                "pretraining_tp": 2,
                "torch_dtype": "float16",
            },
            "head_dim",
            4,
        ),
    ],
)
def test_configs_old_and_new_are_read(tmp_path, fields, attribute, value):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields)
    assert getattr(read_config(tmp_path), attribute) == value


def test_metas_config_has_its_own_defaults(tmp_path):
    model = random_model(dataclasses.replace(SMALL, num_key_value_heads=4))
    write_checkpoint(
        tmp_path, model, "meta2", n_kv_heads=..., rope_theta=..., norm_eps=..., vocab_size=24
    )
    config = read_config(tmp_path)
    assert (config.num_key_value_heads, config.rope_theta, config.rms_norm_eps) == (
        4,
        10000.0,
        1e-5,
    )
    assert (config.vocab_size, config.intermediate_size) == (24, 12)


def test_metas_file_of_a_known_size_gets_the_context_that_it_does_not_tell(tmp_path, monkeypatch):
    model = random_model(dataclasses.replace(SMALL, num_key_value_heads=4, rms_norm_eps=1e-5))
    write_checkpoint(tmp_path, model, "meta2", vocab_size=-1)
    assert read_config(tmp_path).max_position_embeddings == 2048
    known = dataclasses.replace(model.config, max_position_embeddings=4096)
    monkeypatch.setitem(
        llama.CONFIGS,
        "other",
        dataclasses.replace(known, rms_norm_eps=1e-6, max_position_embeddings=1),
    )
    monkeypatch.setitem(llama.CONFIGS, "known", known)
    assert read_config(tmp_path) == known


@pytest.mark.parametrize(
    "name, value",
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),  # beside rope_theta 10000
        ("rope_parameters", {"full_attention": {"rope_theta": 5.0}}),
        ("rope_parameters", {"partial_rotary_factor": 0.5}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("model_type", "mistral"),
        ("model_type", ...),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("head_dim", 8),
        ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": "own.py"}),
        ("vocab_size", ...),
        ("vocab_size", 24.0),
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("hidden_size", True),
        ("hidden_size", 2**40),
        ("num_hidden_layers", 10**9),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", float("nan")),
        ("eos_token_id", [1, 2]),
        ("tie_word_embeddings", "no"),
    ],
)
def test_a_config_that_asks_for_another_model_is_refused_by_name(tmp_path, name, value):
    write_checkpoint(tmp_path, random_model(SMALL), "one.safetensors", **{name: value})
    for read in (read_config, open_weights, load_pretrained):
        with pytest.raises(UserError, match=f"config.json: .*{name}"):
            read(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": 18}, {"hidden_size": 12}, {"num_key_value_heads": 3}]
)
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, fields):
    write_checkpoint(tmp_path, random_model(SMALL), "one.safetensors", **fields)
    with pytest.raises(UserError, match="config.json: .*heads"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "name, value", [("use_scaled_rope", True), ("moe", {"num_experts": 8}), ("lora_args", {})]
)
def test_a_meta_config_that_asks_for_another_model_is_refused_by_name(tmp_path, name, value):
    write_checkpoint(tmp_path, random_model(SMALL), "meta1", **{name: value})
    with pytest.raises(UserError, match=f"params.json: {name}"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\xff", "[" * 100000])
@pytest.mark.parametrize(
    "name, layout",
    [
        ("config.json", "one.bin"),
        ("params.json", "meta2"),
        ("model.safetensors.index.json", "many.safetensors"),
    ],
)
def test_broken_json_is_one_error_that_names_the_file(tmp_path, name, layout, content):
    write_checkpoint(tmp_path, random_model(SMALL), layout)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{name}: "):
        load_pretrained(tmp_path)


def test_a_folder_without_a_model_or_with_a_quantized_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of .*config.json .*params.json"):
        load_pretrained(tmp_path / "nothing")
    write_checkpoint(
        tmp_path, random_model(SMALL), "one.bin", quantization={"bits": 4, "group_size": 32}
    )
    with pytest.raises(UserError, match="quantized"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    write_hf(tmp_path / "b", {"a": torch.ones(1)}, SMALL)
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors or pytorch_model.bin"):
        load_pretrained(tmp_path / "b")


def test_metas_config_may_say_more_than_the_sizes(tmp_path):
    """As LLaMA-2-70B's does."""
    write_checkpoint(
        tmp_path,
        random_model(SMALL),
        "meta1",
        ffn_dim_multiplier=1.3,
        max_batch_size=32,
        max_seq_len=64,
        rope_theta=None,
    )
    assert read_config(tmp_path) == SMALL


@pytest.mark.parametrize(
    "fields, attribute, value",
    [
        (
            {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1},
            "bos_token_id",
            0,
        ),
        ({"architectures": None, "attention_bias": None, "mlp_bias": None}, "hidden_size", 16),
        ({"rope_scaling": {"type": "default"}}, "rope_theta", 10000.0),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_theta", 10000.0),
    ],
)
def test_more_configs_old_and_new_are_read(tmp_path, fields, attribute, value):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields)
    assert getattr(read_config(tmp_path), attribute) == value
