"""GPTQ folders, written here number by number: codes, scales and zeros come out as they went in.

A stream of codes is one large integer here, so nothing is shared with `formats/gptq.py`. What
GPTQModel itself writes is read by tests/clients_gptq.py.
"""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch
from helpers import SEEDS, close, contents, linears, reference_logits, same
from helpers_gptq import (
    CONFIG,
    WRITERS,
    Folder,
    dense,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import formats
from cli.errors import UserError
from formats import gptq, huggingface
from qalora import add_adapters
from quant import QuantLinear, unpack

TOKENS = [3, 1, 4, 1, 5, 9]
MODEL = "gptq_model-4bit-128g.safetensors"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


# ---- what is read


@st.composite
def folders(draw):
    """Any writer, bits and groups, also of single layers, also of the head; narrow layers too."""
    tied, heads = draw(st.booleans()), draw(st.sampled_from([1, 4]))
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, num_key_value_heads=heads)
    kind = st.tuples(st.sampled_from([2, 3, 4]), st.sampled_from([1, 8, 16, 32, -1]))
    mixed = draw(st.dictionaries(st.sampled_from(["k_proj", "down_proj", "lm_head"]), kind))
    bits, group_size = draw(kind)
    if draw(st.booleans()):  # GPTQModel's bits for the head
        mixed["lm_head"] = 8, 32
    writer = draw(st.sampled_from(list(WRITERS)))
    return Folder(draw(SEEDS), config, bits, group_size, writer, **mixed)


@example(Folder(1, bits=4, writer="GPTQModel v1", lm_head=(8, 32)))
@example(Folder(2, bits=2, writer="GPTQModel v1", lm_head=(2, 8)))
@example(Folder(3, bits=3, writer="GPTQModel v1", lm_head=(3, 8)))
@example(Folder(4, bits=4, group_size=-1, writer="AutoGPTQ", k_proj=None, lm_head=(4, 32)))
@example(Folder(5, bits=2, group_size=-1))
@given(folders())
@settings(max_examples=12)
def test_codes_scales_and_zeros_are_read_as_they_were_written(tmp_path_factory, folder):
    path = folder.write(tmp_path_factory.mktemp("gptq"))
    formats.check(path)
    model = formats.load_model(path)
    for name, layer in linears(model).items():
        if name not in folder.layers:
            assert torch.equal(layer.weight, folder.tensors[f"{name}.weight"])
            continue
        parts, codes, zeros = folder.layers[name]
        found = unpack(layer.packed, layer.bits, layer.in_features)
        assert torch.equal(found, torch.tensor(codes, dtype=torch.uint8))
        assert layer.scale.dtype == torch.float16 and torch.equal(layer.scale, parts["scales"].t())
        offset = -parts["scales"].double() * torch.tensor(zeros)
        assert torch.equal(layer.offset.double(), offset.t())
        assert torch.equal(layer.dequantize().double(), folder.weights[f"{name}.weight"])
    assert not any(p.requires_grad for p in model.parameters())
    exact = formats.load_model(path, torch.float64)(torch.tensor([TOKENS])).squeeze(0)
    config = formats.read_config(path)
    untied = "lm_head" in folder.layers
    assert config.tie_word_embeddings == (folder.config.tie_word_embeddings and not untied)
    weights = dict(folder.weights)
    if untied:  # the head becomes float16, as GPTQModel computes it
        weights["lm_head.weight"] = weights["lm_head.weight"].half()
    assert close(exact, reference_logits(weights, config, TOKENS))


@pytest.mark.parametrize(
    "dtype, kept", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
)
def test_scales_that_float16_does_not_hold_stay_as_fine_as_they_are(tmp_path, dtype, kept):
    folder = Folder(dtype=dtype)
    for name in folder.layers:  # one beyond float16's range, or below it
        folder.layers[name][0]["scales"][0, 0] = 2**17 if name == Q else 2**-30
        folder.weights[f"{name}.weight"] = dense(*folder.layers[name])
    layers = linears(formats.load_model(folder.write(tmp_path)))
    for name, layer in layers.items():
        scales = folder.layers[name][0]["scales"]
        assert layer.scale.dtype == kept and torch.equal(layer.scale, scales.t().float())
        error = layer.dequantize().double() - folder.weights[f"{name}.weight"]
        # rounded are scale * code, scale * zero and their sum, each at most 15 scales large
        largest = 15 * scales.t().double().abs().repeat_interleave(16, dim=1)
        assert (error.abs() <= 3 * 2**-24 * largest).all()


def test_scales_that_float16_holds_become_float16(tmp_path):
    folder = Folder(dtype=torch.float32)
    for name in folder.layers:
        scales = folder.tensors[f"{name}.scales"]
        scales.copy_(scales.half())
    for name, layer in linears(formats.load_model(folder.write(tmp_path))).items():
        assert layer.scale.dtype == torch.float16
        assert torch.equal(layer.scale.float(), folder.tensors[f"{name}.scales"].t())


def test_its_base_is_a_folder_of_our_own_with_the_same_bits(tmp_path):
    folder = Folder(q_proj=None, v_proj=(3, 8), lm_head=(4, 16))
    source, base = folder.write(tmp_path / "gptq"), tmp_path / "base"
    before = contents(source)
    formats.import_base(source, base)
    assert contents(source) == before and sorted(p.name for p in base.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    model, back = formats.load_model(source), formats.load_model(base)
    with torch.device("meta"):  # as where the room on the disk is checked
        assert formats.read_config(source) == back.config == model.config == CONFIG
    assert list(back.state_dict()) == list(model.state_dict())
    assert same(back.state_dict().values(), model.state_dict().values())
    described = {"bits": 4, "group_size": 16, "layers": {Q: None}}
    described["layers"][Q.replace("q_proj", "v_proj")] = {"bits": 3, "group_size": 8}
    assert formats.quantization_of(source) == formats.quantization_of(base) == described


def test_layers_that_are_not_quantized_stay_float_and_are_not_adapted(tmp_path):
    folder = Folder(q_proj=None, down_proj=None)
    folder.fields["dynamic"] = {"-:.*q_proj": {}, "-:.*down_proj": {}}
    model = add_adapters(formats.load_model(folder.write(tmp_path)), 2, 4)
    kinds = {name: type(model.get_submodule(name)).__name__ for name in (Q, DOWN)}
    assert set(kinds.values()) == {"Linear"}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 5 * 2
    assert not any(name.startswith((Q, DOWN)) for name in trained)


def test_float_parts_are_of_a_dtype_that_holds_all_of_them_or_the_one_asked_for(tmp_path):
    folder = Folder(lm_head=(4, 16), q_proj=None)
    folder.tensors["model.norm.weight"] = folder.tensors["model.norm.weight"].float()
    path = folder.write(tmp_path)
    for dtype in (None, torch.bfloat16):
        model = formats.load_model(path, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
        assert {layer.offset.dtype for _, layer in packed(model)} == {torch.float32}


def packed(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, QuantLinear)]


# ---- where it lies


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", MODEL, "index"])
def test_a_folder_is_found_under_the_names_that_are_in_use(tmp_path, name, beside):
    folder = Folder(writer="AutoGPTQ")
    one = "first-00001-of-00002.safetensors"
    path = folder.write(tmp_path, name if name != "index" else one, beside)
    if name == "index":
        files = dict.fromkeys(folder.tensors, one)
        files[f"{Q}.scales"] = "first-00002-of-00002.safetensors"
        parts = {file: {} for file in files.values()}
        for tensor, file in files.items():
            parts[file][tensor] = folder.tensors[tensor]
        for file, tensors in parts.items():
            safetensors.torch.save_file(tensors, path / file)
        index = path / f"{MODEL}.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    assert formats.format_of(path) is gptq
    for layer, module in linears(formats.load_model(path)).items():
        assert torch.equal(module.dequantize().double(), folder.weights[f"{layer}.weight"])
    files = {file.name for file in path.iterdir() if not file.name.endswith("index.json")}
    assert {file.name for file in formats.files(path)} == files


def test_an_index_that_lacks_a_shard_is_refused(tmp_path):
    folder = Folder()
    path = folder.write(tmp_path / "gptq", "one.safetensors")
    files = dict.fromkeys(folder.tensors, "one.safetensors")
    (path / f"{MODEL}.index.json").write_text(json.dumps({"weight_map": files}))
    formats.check(path)
    files[f"{Q}.scales"] = "two.safetensors"
    (path / f"{MODEL}.index.json").write_text(json.dumps({"weight_map": files}))
    refused(path, "two.safetensors: no such file")


def test_other_folders_are_not_taken_for_gptq(tmp_path):
    folder = Folder()
    for method in ("awq", "marlin", None):
        folder.fields["quant_method"] = method
        path = folder.write(tmp_path)
        assert formats.format_of(path) is huggingface
        with pytest.raises(UserError, match="config.json: quantization_config"):
            formats.check(path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = None
    for own in ({"quantization_config": ["gptq"]}, {"quantization": {"bits": 4, "group_size": 8}}):
        (path / "config.json").write_text(json.dumps({**config, **own}))
        (path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
        assert formats.format_of(path) is not gptq
    (path / "config.json").write_text(json.dumps(config))
    assert formats.format_of(path) is gptq
    (path / "quantize_config.json").write_text(json.dumps({"bits": 4, "quant_method": "awq"}))
    assert formats.format_of(path) is huggingface


# ---- what is refused


def refused(path, says):
    """Every function that looks at the weights refuses them in one line; nothing is written."""
    base = path.parent / "base"
    for function in (formats.check, formats.load_model, lambda p: formats.import_base(p, base)):
        with pytest.raises(UserError, match=says) as error:
            function(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not base.exists()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"bits": 8}, "bits = 8 is not supported, only 2, 3 and 4"),
        ({"bits": 5}, "bits = 5"),
        ({"bits": 4.0}, "bits = 4.0"),
        ({"bits": True}, "bits = true"),
        ({"bits": "4"}, 'bits = "4"'),
        ({"bits": None}, "bits = null"),
        ({"bits": 3}, f"{Q}.qweight is of 4 bits in groups of 16, but config.json says 3 bits"),
        ({"group_size": 0}, "group_size = 0"),
        ({"group_size": -2}, "group_size = -2"),
        ({"group_size": 16.0}, "group_size = 16.0"),
        ({"group_size": None}, "group_size = null"),
        ({"group_size": 8}, f"{Q}.scales is of 4 bits in groups of 16, but config.json says 4"),
        ({"group_size": 128}, f"{Q}.scales is of 4 bits in groups of 16, but .* groups of 128"),
        ({"group_size": -1}, f"{Q}.scales is of 4 bits in groups of 16, but .* groups of -1"),
        ({"checkpoint_format": "marlin"}, 'checkpoint_format = "marlin" is not supported'),
        ({"checkpoint_format": "bitblas"}, 'checkpoint_format = "bitblas"'),
        ({"format": "gptq_p"}, 'format = "gptq_p" is not supported, only gptq and gptq_v2'),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format"),
        ({"is_marlin_format": True}, "is_marlin_format = true"),
        ({"rotation": "hadamard"}, 'rotation = "hadamard"'),
        ({"adapter": {"rank": 8}}, 'adapter = {"rank": 8}'),
        ({"activation": {"bits": 8}}, 'activation = {"bits": 8}'),
    ],
    ids=str,
)
def test_a_config_that_asks_for_something_else_is_refused(tmp_path, change, says):
    folder = Folder()
    folder.fields |= change
    refused(folder.write(tmp_path / "gptq"), f"(config.json: GPTQ with|tensor) {says}")


def test_a_group_size_above_the_inputs_is_one_group(tmp_path):
    folder = Folder(group_size=32, down_proj=(4, 64))
    folder.fields |= {"group_size": 64, "dynamic": None}
    formats.check(folder.write(tmp_path))


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    """A change of the tensor `name` into `make(tensor)`."""

    def change(tensors):
        tensors[name] = make(tensors[name]).contiguous()

    return change


def nan(tensor):
    tensor = tensor.clone()
    tensor[-1, -1] = torch.nan
    return tensor


def with_one(name, make):
    """A change that adds `name`."""

    def change(tensors):
        tensors[name] = make()

    return change


def as_8_bits(tensors):
    for part, dim in (("qweight", 0), ("qzeros", 1)):
        tensors[f"{Q}.{part}"] = torch.cat([tensors[f"{Q}.{part}"]] * 2, dim)


CHANGES = [
    (without(f"{Q}.qweight"), f"{Q}.qweight is missing"),
    (without(f"{Q}.qzeros"), f"{Q}.qzeros is missing"),
    (without(f"{Q}.scales"), f"{Q}.scales is missing"),
    (without("model.norm.weight"), "model.norm.weight is missing"),
    (with_one(f"{Q}.weight", lambda: torch.zeros(32, 32)), f"{Q}.qweight is there, and so is"),
    (with_one("lm_head.qzeros", lambda: torch.zeros(1)), "lm_head.qweight is missing"),
    (with_one("model.embed_tokens.qweight", lambda: torch.zeros(1)), "qweight is unexpected"),
    (with_one(f"{Q}.qweights", lambda: torch.zeros(1)), f"{Q}.qweights is unexpected"),
    (with_one(f"{Q}.bias", lambda: torch.eye(32)[3]), f"{Q}.bias is not 32 zeros"),
    (with_one(f"{Q}.bias", lambda: torch.full((32,), torch.nan)), f"{Q}.bias is not 32 zeros"),
    (with_one(f"{Q}.bias", lambda: torch.zeros(31)), f"{Q}.bias is not 32 zeros"),
    (with_one("lm_head.bias", lambda: torch.ones(20)), "lm_head.bias is not 20 zeros"),
    (put(f"{Q}.qweight", lambda t: t[:-1]), f"{Q}.qzeros .2, 4. does not hold 2 x 32 zeros of 3"),
    (put(f"{Q}.qweight", lambda t: t[:0]), f"{Q}.qweight .0, 32. does not hold"),
    (as_8_bits, f"{Q}.qweight is of 8 bits; layers of 2, 3 and 4 bits can"),
    (put(f"{DOWN}.qweight", lambda t: torch.cat([t, t[:1]])), "qweight .9, 32. does not hold"),
    (put(f"{Q}.qweight", lambda t: t[:, :24]), f"{Q}.qweight .4, 24. does not hold"),
    (put(f"{Q}.qweight", lambda t: t[0, 0]), f"{Q}.qweight .. does not hold"),
    (put(f"{Q}.qweight", lambda t: t.flatten()), f"{Q}.qweight .128. does not hold"),
    (put(f"{Q}.qweight", lambda t: t.long()), f"{Q}.qweight holds torch.int64, not torch.int32"),
    (put(f"{Q}.qweight", lambda t: t.float()), f"{Q}.qweight holds torch.float32"),
    (put(f"{Q}.qzeros", lambda t: t[:, :3]), f"{Q}.qzeros .2, 3. does not hold 2 x 32 zeros"),
    (put(f"{Q}.qzeros", lambda t: t[:1]), f"{Q}.qzeros .1, 4. does not hold"),
    (put(f"{Q}.qzeros", lambda t: t.short()), f"{Q}.qzeros holds torch.int16"),
    (put(f"{Q}.scales", lambda t: t[:, :3]), f"{Q}.scales .2, 3. does not divide 32 x 32"),
    (put(f"{Q}.scales", lambda t: t[:0]), f"{Q}.scales .0, 32. does not divide"),
    (put(f"{Q}.scales", lambda t: t[0, 0]), f"{Q}.scales .. does not divide"),
    (put(f"{Q}.scales", lambda t: torch.cat([t, t[:1]])), f"{Q}.scales .3, 32. does not divide"),
    (put(f"{Q}.scales", lambda t: t.double()), f"{Q}.scales holds torch.float64"),
    (put(f"{DOWN}.g_idx", lambda t: t.flip(0)), f"{DOWN}.g_idx does not put .* desc_act=False"),
    (put(f"{DOWN}.g_idx", lambda t: t + 1), f"{DOWN}.g_idx does not put"),
    (put(f"{DOWN}.g_idx", lambda t: t * 0), f"{DOWN}.g_idx does not put"),
    (put(f"{DOWN}.g_idx", lambda t: t[:-1]), f"{DOWN}.g_idx does not put"),
    (put(f"{DOWN}.g_idx", lambda t: t.half()), f"{DOWN}.g_idx holds torch.float16, not torch.int"),
    (put("lm_head.weight", lambda t: t[1:]), "lm_head.weight has the shape .19, 32."),
]


@pytest.mark.parametrize("change, says", CHANGES, ids=[says for _, says in CHANGES])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, says):
    folder = Folder()
    change(folder.tensors)
    refused(folder.write(tmp_path / "gptq"), f"model.safetensors: tensor .*{says}")


@pytest.mark.parametrize(
    "name, value",
    [(f"{Q}.scales", torch.nan), (f"{DOWN}.scales", -torch.inf), ("lm_head.weight", torch.nan)],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path, name, value):
    folder = Folder()
    folder.tensors[name][-1, -1] = value
    path = folder.write(tmp_path / "gptq")
    says = f"model.safetensors: tensor {name} has NaN or infinite values"
    with pytest.raises(UserError, match=says):
        formats.load_model(path)
    with pytest.raises(UserError, match=says):
        formats.import_base(path, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_desc_act_in_order_is_fine_and_without_an_order_is_refused(tmp_path):
    folder = Folder()
    folder.fields["desc_act"] = True
    formats.check(folder.write(tmp_path))
    del folder.tensors[f"{Q}.g_idx"]
    with pytest.raises(UserError, match=f"{Q}.g_idx is missing, which desc_act needs"):
        formats.check(folder.write(tmp_path))
    folder.fields["desc_act"] = False
    formats.check(folder.write(tmp_path))


def test_biases_of_zeros_are_left_out(tmp_path):
    folder = Folder(q_proj=None)
    for name, outputs in ((Q, 32), (DOWN, 32), ("lm_head", 20)):
        folder.tensors[f"{name}.bias"] = torch.zeros(outputs, dtype=torch.float16)
    assert not any(
        "bias" in name for name in formats.load_model(folder.write(tmp_path)).state_dict()
    )


def test_without_a_dynamic_entry_all_layers_are_what_the_config_says(tmp_path):
    folder = Folder(v_proj=(3, 16))
    folder.fields["dynamic"] = None
    refused(folder.write(tmp_path / "gptq"), "v_proj.qweight is of 3 bits in groups of 16")


def test_a_folder_with_no_quantized_layer_is_refused(tmp_path):
    names = [name.rpartition(".")[2] for name in Folder().layers]
    folder = Folder(**dict.fromkeys(names))
    refused(folder.write(tmp_path / "gptq"), "model.safetensors: no layer has a tensor qweight")


@given(st.data())
@settings(max_examples=20)
def test_a_truncated_file_is_one_error_that_names_it(tmp_path_factory, data):
    path = Folder().write(tmp_path_factory.mktemp("truncated"))
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match="model.safetensors: not a file of weights, or truncated"):
        formats.check(path)


def test_several_files_without_an_index_and_pickles_are_refused(tmp_path):
    path = Folder().write(tmp_path / "gptq")
    file = path / "model.safetensors"
    shutil.copy(file, path / MODEL)
    refused(path, f"gptq: one .safetensors file or one index .* found {MODEL}, model.safetensors")
    file.unlink()
    (path / MODEL).rename(path / "pytorch_model.bin")
    refused(path, "gptq: one .safetensors file .* found none; .* save it as safetensors")
