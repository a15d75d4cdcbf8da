"""The folder of a quantized model comes back bit for bit, or is refused by name."""

import contextlib
import json
import pathlib

import pytest
import safetensors.torch
import torch
from helpers import TOKENS, linears, random_llama, same
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
from cli.errors import UserError
from formats.huggingface import save_pretrained
from formats.quantized import load_quantized, save_quantized
from merge import merge
from qalora import QALoRALinear, adapter_parameters, add_adapters
from quant import QuantLinear, quantize_model, quantize_rtn


@pytest.mark.parametrize(
    "bits, tied, dtype",
    [
        (2, False, torch.float32),
        (3, True, torch.bfloat16),
        (4, True, torch.float32),
        (4, False, torch.float16),
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, bits, tied, dtype):
    model = quantize_model(random_llama(tie_word_embeddings=tied).to(dtype), bits, 8)
    (tmp_path / "tokenizer.model").write_bytes(b"mine")
    save_quantized(model, tmp_path, calibration="none")
    back = load_quantized(tmp_path)
    assert back.config == model.config and list(back.state_dict()) == list(model.state_dict())
    assert same(back.state_dict().values(), model.state_dict().values())
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert torch.equal(back(TOKENS), model(TOKENS))
    assert all(layer.bits == bits and layer.group_size == 8 for layer in linears(back).values())
    assert not any(p.requires_grad for p in back.parameters())
    assert formats.quantization_of(tmp_path)["calibration"] == "none"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    ]


def test_the_tensors_of_a_loaded_model_stay_in_their_file(tmp_path):
    """Memory-mapped: so a model of gigabytes is there at once and takes no memory of its own."""
    save_quantized(quantize_model(random_llama(), 4, 8), tmp_path)
    back = load_quantized(tmp_path)
    if not pathlib.Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells")
    maps, file = pathlib.Path("/proc/self/maps").read_text(), str(tmp_path / "model.safetensors")
    lines = [line.split() for line in maps.splitlines() if file in line]
    mapped = [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]
    assert all(any(t.data_ptr() in part for part in mapped) for t in back.state_dict().values())


@pytest.mark.parametrize("where", ["on saving", "on loading"])
def test_the_dtype_asked_for_is_that_of_embedding_norms_and_head_only(tmp_path, where):
    model = quantize_model(random_llama(tie_word_embeddings=True), 4, 8)
    save_quantized(model, tmp_path, dtype=torch.bfloat16 if where == "on saving" else None)
    back = load_quantized(tmp_path, dtype=torch.bfloat16 if where == "on loading" else None)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert same(dict(back.named_buffers()).values(), dict(model.named_buffers()).values())
    assert back.lm_head.weight is back.model.embed_tokens.weight


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(config, weights): the content of the two files of a quantized model."""
    folder = tmp_path_factory.mktemp("saved")
    save_quantized(quantize_model(random_llama(num_hidden_layers=1), 3, 8), folder)
    return json.loads((folder / "config.json").read_text()), (
        folder / "model.safetensors"
    ).read_bytes()


def refused(folder, config, weights, says=None):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=says) as error:
        load_quantized(folder)
    assert str(folder) in str(error.value) or "model.layers.0" in str(error.value), error.value


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"bits": 4.0},
        {"bits": 4},
        {"bits": None},
        {"bits": [3]},
        {"bits": True},
        {"group_size": 4},
        {"group_size": 7},
        {"group_size": 0},
        {"group_size": -8},
        {"group_size": 8.0},
        {"group_size": "8"},
        {"group_size": 10**40},
        {"group_size": None},
        3,
        "4",
        [4, 8],
        None,
        False,
    ],
    ids=str,
)
def test_a_config_that_does_not_describe_the_weights_is_refused(tmp_path, saved, change):
    config, weights = saved
    changed = {**config["quantization"], **change} if isinstance(change, dict) else change
    refused(tmp_path, {**config, "quantization": changed}, weights)


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "3", "null", "[" * 9999, "{}", '{"quantization": {}}'],
    ids=lambda text: text[:10],
)
def test_a_config_that_is_none_is_refused(tmp_path, saved, config):
    refused(tmp_path, config, saved[1])


@settings(max_examples=60)
@given(st.data())
def test_a_file_cut_short_is_refused_and_a_damaged_header_causes_no_other_error(
    saved, tmp_path_factory, data
):
    config, weights = saved
    folder, header = tmp_path_factory.mktemp("damaged"), 8 + int.from_bytes(weights[:8], "little")
    refused(folder, config, weights[: data.draw(st.integers(0, len(weights) - 1))])
    at, byte = data.draw(st.integers(0, header - 1)), data.draw(st.binary(min_size=1, max_size=1))
    (folder / "model.safetensors").write_bytes(weights[:at] + byte + weights[at + 1 :])
    with contextlib.suppress(UserError):  # some changes change nothing
        load_quantized(folder)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.scale"), "up_proj.scale is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(17)}), "model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int32)}),
            "model.norm.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.scale": torch.zeros(24, 2).double()}),
            "up_proj.scale",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.offset": torch.zeros(24, 2).half()}),
            "up_proj.offset",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.packed": torch.zeros(24, 16).byte()}),
            "up_proj.packed",
        ),
        (
            lambda t: t["model.norm.weight"][3:].fill_(torch.inf),
            "model.norm.weight has NaN or infinite values",
        ),
        (
            lambda t: t["model.layers.0.mlp.up_proj.offset"][-1].fill_(torch.nan),
            "up_proj.offset has NaN or infinite",
        ),
        (
            lambda t: t["model.layers.0.mlp.up_proj.scale"][:1].fill_(-torch.inf),
            "up_proj.scale has NaN or infinite",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, saved, change, says):
    tensors = safetensors.torch.load(saved[1])
    change(tensors)
    refused(tmp_path, saved[0], safetensors.torch.save(tensors), says)


def test_a_float_model_or_an_empty_folder_is_no_quantized_model(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_quantized(tmp_path)
    save_pretrained(random_llama(), tmp_path)
    with pytest.raises(UserError, match="no quantized model"):
        load_quantized(tmp_path)
    assert formats.quantization_of(tmp_path) is None


# ---- layers that differ, as files of others have them


def mixed_llama(seed=0):
    """A model of one block: 2, 3 and 4 bits, several group sizes, float32 scales, a float layer."""
    model = quantize_model(random_llama(num_hidden_layers=1), 4, 8)
    draw = torch.Generator().manual_seed(seed)
    kinds = {"v_proj": (2, 16), "o_proj": (3, 4), "down_proj": (4, 24), "gate_proj": None}
    for name, layer in linears(model).items():
        kind = kinds.get(name.rpartition(".")[2], (layer.bits, layer.group_size))
        w = torch.randn(layer.out_features, layer.in_features, generator=draw)
        if kind is None:
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = torch.nn.Parameter(w)
            model.set_submodule(name, plain)
            continue
        quantized = quantize_rtn(w, *kind)
        third = quantized.scale.float() / 3  # not a float16
        model.set_submodule(
            name, QuantLinear.from_quantized(quantized._replace(scale=third), kind[0])
        )
    return model


def test_layers_that_differ_come_back_bit_for_bit_and_the_config_names_them(tmp_path):
    model = mixed_llama()
    save_quantized(model, tmp_path)
    back = load_quantized(tmp_path)
    assert same(back.state_dict().values(), model.state_dict().values())
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(back(TOKENS), model(TOKENS))
    block = "model.layers.0."
    assert formats.quantization_of(tmp_path) == {
        "bits": 4,
        "group_size": 8,
        "layers": {
            f"{block}self_attn.v_proj": {"bits": 2, "group_size": 16},
            f"{block}self_attn.o_proj": {"bits": 3, "group_size": 4},
            f"{block}mlp.gate_proj": None,
            f"{block}mlp.down_proj": {"bits": 4, "group_size": 24},
        },
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_differ_are_adapted_and_merged_to_the_same_bits(dtype):
    """The layer that stayed float stays frozen: what is merged into it could not be quantized."""
    model = add_adapters(mixed_llama().to(dtype), 2, 4.0)
    adapted = {name for name, m in model.named_modules() if isinstance(m, QALoRALinear)}
    assert len(adapted) == 6 and not any("gate_proj" in name for name in adapted)
    before = model.model.layers[0].mlp.gate_proj.weight.clone()
    for p in adapter_parameters(model).values():
        torch.nn.init.normal_(p, std=0.1)
    expected = model(TOKENS)
    assert torch.equal(merge(model)(TOKENS), expected)
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight, before)


def test_targets_that_all_stayed_float_are_refused():
    with pytest.raises(UserError, match="gate_proj: none of them is quantized in groups"):
        add_adapters(mixed_llama(), 2, 4.0, ["gate_proj"])


@pytest.mark.parametrize(
    "layers",
    [
        3,
        [None],
        {"model.layers.0.mlp.down_proj": 4},
        {"model.layers.0.mlp.down_proj": {"bits": 5, "group_size": 8}},
        {"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 0}},
        {"model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 7}},
        {"model.layers.0.mlp.down_proj": {"bits": 2, "group_size": 8}},
        {"model.layers.0.mlp.down_proj": None},
        {"model.layers.1.mlp.down_proj": None},
        {"lm_head": None},
    ],
    ids=str,
)
def test_layers_that_do_not_describe_the_weights_are_refused(tmp_path, saved, layers):
    config, weights = saved
    refused(
        tmp_path, {**config, "quantization": {**config["quantization"], "layers": layers}}, weights
    )
