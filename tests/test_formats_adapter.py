"""A saved adapter comes back bit for bit; one that does not fit is refused by name."""

import json

import pytest
import safetensors.torch
import torch
from helpers import TWO_LAYERS, integers, quantized_llama, same
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.errors import UserError
from formats.adapter import load_adapter, save_adapter
from llama import LINEARS, Llama
from qalora import adapter_parameters, add_adapters


def randomized(model):
    """The adapters' parameters drawn anew, B too."""
    torch.manual_seed(1)
    for p in adapter_parameters(model).values():
        p.data = torch.randn_like(p)
    return model


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(LINEARS), min_size=1, unique=True),
    st.integers(1, 5) | st.just("full"),
    st.sampled_from([1, 16, 0.5]),
)
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path_factory, targets, rank, alpha):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model = randomized(add_adapters(quantized_llama(), rank, alpha, targets))
    save_adapter(model, folder, base="abc", method="qalora")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    back = quantized_llama()
    assert load_adapter(back, folder) == {
        "rank": rank,
        "alpha": alpha,
        "targets": [name for name in LINEARS if name in targets],
        "base": "abc",
        "method": "qalora",
    }
    assert same(back.state_dict().values(), model.state_dict().values())
    tokens = integers(0, 0, 39, 2, 9, dtype=torch.long)
    assert torch.equal(back(tokens), model(tokens))


@pytest.fixture
def saved(tmp_path):
    save_adapter(
        randomized(add_adapters(quantized_llama(), 2, 16)), tmp_path / "adapter", base="abc"
    )
    return tmp_path / "adapter"


def refused(folder, says, model=None):
    with pytest.raises(UserError, match=says) as error:
        load_adapter(model or quantized_llama(), folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_an_adapter_of_other_groups_is_refused(saved, group_size):
    """One number a group: over other groups it would be nonsense."""
    refused(
        saved,
        rf"lora_A is \[2, 3\] where the model needs \[2, {24 // group_size}\].*group size",
        quantized_llama(group_size=group_size),
    )


def test_an_adapter_of_another_method_is_refused(saved):
    refused(saved, "lora_A", Llama(TWO_LAYERS))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.lora_B"), "up_proj.lora_B is missing"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.lora_B": torch.zeros(24, 2)}),
            "layers.2.mlp.up_proj.lora_B",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.lora_B": torch.zeros(25, 2)}),
            "layers.0.mlp.up_proj.lora_B",
        ),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_named(saved, change, says):
    tensors = safetensors.torch.load_file(saved / "adapter.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, saved / "adapter.safetensors")
    refused(saved, says)


def test_a_truncated_adapter_is_refused(saved):
    content = (saved / "adapter.safetensors").read_bytes()
    for length in [0, 7, 8, 100, len(content) // 2, len(content) - 1]:
        (saved / "adapter.safetensors").write_bytes(content[:length])
        refused(saved, "damaged")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_missing_file_is_refused_by_name(saved, name):
    (saved / name).unlink()
    refused(saved, name)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": "2"},
        {"rank": "full"},
        {"rank": 2.0},
        {"rank": True},
        {"rank": None},
        {"rank": 3},
        {"alpha": "16"},
        {"alpha": None},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"targets": "q_proj"},
        {"targets": None},
        {"targets": []},
        {"targets": [1]},
        {"targets": ["q_proj"]},
        {"targets": [["q_proj"]]},
    ],
    ids=str,
)
def test_settings_that_do_not_describe_the_adapter_are_refused(saved, change):
    path = saved / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(saved, "adapter")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"rank": 2, "alpha": 16}', "[" * 9999],
    ids=lambda text: text[:9],
)
def test_settings_that_are_none_are_refused(saved, text):
    (saved / "adapter.json").write_text(text)
    refused(saved, "adapter.json")
