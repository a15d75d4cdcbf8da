"""A config is read in all its forms, or refused by the name of what is not computed."""

import dataclasses
import json

import pytest
import torch
from helpers import SMALL, random_model
from helpers_checkpoints import write_checkpoint, write_hf

import llama
from cli.errors import UserError
from formats import open_weights, read_config
from formats.files import write_config
from llama import load_pretrained

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


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
        ("rope_scaling", "linear"),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),  # beside rope_theta 10000
        ("rope_parameters", {"full_attention": {"rope_theta": 5.0}}),
        ("rope_parameters", {"partial_rotary_factor": 0.5}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("model_type", "mistral"),  # with a LLaMA's architectures
        ("model_type", ["llama"]),
        ("model_type", ...),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("head_dim", 5),
        ("head_dim", "4"),
        ("head_dim", 0),
        ("sliding_window", 63),  # of a context of 64
        ("sliding_window", "64"),
        ("original_max_position_embeddings", 64),
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
        ("eos_token_id", []),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", [[1]]),
        ("bos_token_id", [1]),
        ("tie_word_embeddings", "no"),
    ],
)
def test_a_config_that_asks_for_another_model_is_refused_by_name(tmp_path, name, value):
    write_checkpoint(tmp_path, random_model(SMALL), "one.safetensors", **{name: value})
    for read in (read_config, open_weights, load_pretrained):
        with pytest.raises(UserError, match=f"config.json: .*{name}"):
            read(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 18},
        {"hidden_size": 12, "head_dim": None},
        {"hidden_size": 12, "head_dim": ...},
        {"num_key_value_heads": 3},
    ],
)
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, fields):
    write_checkpoint(tmp_path, random_model(SMALL), "one.safetensors", **fields)
    with pytest.raises(UserError, match="config.json: .*heads"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "name, value", [("use_scaled_rope", "yes"), ("moe", {"num_experts": 8}), ("lora_args", {})]
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
    with pytest.raises(UserError, match="there is no .*nothing; name a model or a run"):
        load_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="none of .*config.json .*params.json"):
        load_pretrained(tmp_path)
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
        ({"bos_token_id": None, "eos_token_id": [1, 3]}, "eos_token_id", [1, 3]),
        ({"bos_token_id": None, "eos_token_id": None}, "bos_token_id", None),
        ({"head_dim": 6}, "head_dim", 6),
        ({"head_dim": None}, "head_dim", 4),
        ({"head_dim": ..., "hidden_size": 24}, "head_dim", 6),
        ({"hidden_size": 12}, "head_dim", 4),  # 12 / 4 would be odd
        ({"sliding_window": 64}, "max_position_embeddings", 64),
        (MISTRAL | {"sliding_window": None, "head_dim": 6}, "head_dim", 6),
        (MISTRAL | {"sliding_window": 64, "architectures": None}, "num_key_value_heads", 2),
        (MISTRAL | {"sliding_window": ...}, "max_position_embeddings", 64),  # 4096 by default
        (MISTRAL | {"num_key_value_heads": None}, "num_key_value_heads", 4),
    ],
)
def test_more_configs_old_and_new_are_read(tmp_path, fields, attribute, value):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields)
    assert getattr(read_config(tmp_path), attribute) == value


def test_mistrals_own_defaults_count(tmp_path):
    left_out = {"num_key_value_heads": ..., "max_position_embeddings": ...}
    fields = MISTRAL | {"num_attention_heads": 16, "head_dim": 2, **left_out}
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields, sliding_window=None)
    config = read_config(tmp_path)
    assert (config.num_key_value_heads, config.max_position_embeddings) == (8, 131072)
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields)
    with pytest.raises(UserError, match="config.json: sliding_window = 4096 is not supported"):
        read_config(tmp_path)


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "fields, scaling, theta",
    [
        ({"rope_scaling": LINEAR}, LINEAR, 1e4),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, LINEAR, 1e4),
        ({"rope_scaling": LINEAR | {"type": "linear"}}, LINEAR, 1e4),
        ({"rope_scaling": LLAMA3, "rope_theta": 5e5}, LLAMA3, 5e5),
        ({"rope_scaling": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": ...}, LLAMA3, 5e5),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": ...}, LLAMA3, 5e5),
        ({"rope_parameters": LINEAR | {"rope_theta": 1e4}}, LINEAR, 1e4),
        ({"rope_parameters": LINEAR | {"original_max_position_embeddings": 9}}, LINEAR, 1e4),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR}, LINEAR, 1e4),
        ({"rope_parameters": {"rope_type": "none"}, "rope_scaling": {}}, None, 1e4),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}, "rope_theta": ...}, None, 1e4),
    ],
)
def test_rope_scaling_is_read_where_old_and_new_configs_keep_it(tmp_path, fields, scaling, theta):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields)
    expected = dataclasses.replace(SMALL, rope_scaling=scaling, rope_theta=theta)
    assert read_config(tmp_path) == expected
    write_config(read_config(tmp_path), tmp_path / "again")
    assert read_config(tmp_path / "again") == expected


@pytest.mark.parametrize("entry", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "scaling, reason",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 'of type "dynamic" is not supported'),
        ({"type": "yarn", "factor": 2.0}, 'of type "yarn" is not supported'),
        ({"rope_type": "longrope", "long_factor": [1.0]}, 'of type "longrope" is not supported'),
        ({"rope_type": ["linear"], "factor": 2.0}, r'of type \["linear"\] is not supported'),
        ({"rope_type": None, "factor": 2.0}, "factor = 2.0 is not supported with type default"),
        (LINEAR | {"type": "default"}, "has two types"),
        (LLAMA3 | {"low_freq_factor": 4}, "high_freq_factor = 4.0 is not above"),
        (LLAMA3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA3 | {"attention_factor": 2.0}, "attention_factor = 2.0 is not supported"),
        (LINEAR | {"low_freq_factor": 1.0}, "low_freq_factor = 1.0 is not supported"),
        ({"factor": 2.0}, "factor = 2.0 is not supported with type default"),
        (LINEAR | {"rope_theta": 5.0}, "contradict each other"),
        ([LINEAR], "is no JSON object"),
    ],
)
def test_rope_scaling_of_another_kind_is_one_error_that_names_it(tmp_path, entry, scaling, reason):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **{entry: scaling})
    with pytest.raises(UserError, match=f"config.json: .*{entry}.*{reason}") as e:
        read_config(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("field", sorted(LLAMA3.keys() - {"rope_type"}))
@pytest.mark.parametrize("value", [..., None, "8", 0, -1, float("nan"), float("inf"), True, [8]])
def test_a_number_of_rope_scaling_that_is_missing_or_not_sensible_is_named(tmp_path, field, value):
    for scaling in (LLAMA3, LINEAR):
        if field in scaling:
            damaged = {k: v for k, v in (scaling | {field: value}).items() if v is not ...}
            write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, rope_scaling=damaged)
            with pytest.raises(UserError, match=rf"config.json: rope_scaling\.{field} ") as e:
                read_config(tmp_path)
            assert "\n" not in str(e.value)


def test_a_factor_that_would_shorten_the_context_and_two_scalings_are_refused(tmp_path):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, rope_scaling=LINEAR | {"factor": 0.5})
    with pytest.raises(UserError, match=r"rope_scaling\.factor = 0.5 is not sensible"):
        read_config(tmp_path)
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, rope_scaling=LINEAR, rope_parameters=LLAMA3)
    with pytest.raises(UserError, match="rope_scaling and rope_parameters contradict each other"):
        read_config(tmp_path)


PUBLISHED = {  # config.json as it is published, without what every one of these has
    "llama3.2-1b": {
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "smollm2-360m": {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 64,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "tinyllama-1.1b": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
}
IN_ALL = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_named_sizes(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(IN_ALL | PUBLISHED[name]))
    assert read_config(tmp_path) == llama.CONFIGS[name]


# ---- Meta's


def test_metas_scaled_rope_is_that_of_its_code(tmp_path):
    write_checkpoint(tmp_path, random_model(SMALL), "meta1", use_scaled_rope=True)
    expected = dataclasses.replace(SMALL, rope_scaling=LLAMA3, max_position_embeddings=131072)
    assert read_config(tmp_path) == expected
    write_checkpoint(tmp_path, random_model(SMALL), "meta1", use_scaled_rope=False)
    assert read_config(tmp_path) == dataclasses.replace(SMALL, max_position_embeddings=2048)


@pytest.mark.parametrize("tied", [False, True])
def test_metas_scaled_rope_of_a_known_size_has_that_ones_factor(tmp_path, monkeypatch, tied):
    known = dataclasses.replace(
        SMALL, rope_scaling=LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True
    )
    monkeypatch.setitem(llama.CONFIGS, "known", known)
    model = random_model(dataclasses.replace(SMALL, tie_word_embeddings=tied))
    write_checkpoint(tmp_path, model, "meta1", use_scaled_rope=True)
    assert read_config(tmp_path).rope_scaling["factor"] == (32 if tied else 8)


def test_a_llama_1_or_2_without_its_head_is_incomplete_not_tied(tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=32000, tie_word_embeddings=True)
    write_checkpoint(tmp_path, random_model(config), "meta1")
    with pytest.raises(UserError, match="output.weight is missing"):
        open_weights(tmp_path)


def test_metas_llama_3_has_its_own_tokens(tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=128256)
    write_checkpoint(tmp_path, random_model(config), "meta1", vocab_size=128256)
    read = read_config(tmp_path)
    assert (read.bos_token_id, read.eos_token_id) == (128000, 128001)
