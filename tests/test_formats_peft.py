"""QA-LoRA adapters in PEFT's folders: merged, they compute what their libraries' forward does.

That forward pass stands here by hand in float64, from the sources that formats/peft.py names. That
the libraries agree is checked with the libraries themselves in tests/clients_peft.py.
"""

import json
import os
import random
import shutil

import pytest
import safetensors.torch
import torch
from helpers import contents, dense, linears, normal, random_quantized, run_in_process, same
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
import merge
from baselines import quantize_model_nf4
from formats import peft
from formats.huggingface import save_pretrained
from formats.quantized import save_quantized
from llama import LINEARS, Llama, LlamaConfig
from qalora import QALoRALinear
from quant import QuantLinear
from text.tokenizer import train_tokenizer

CONFIG = LlamaConfig(300, 24, 48, 2, 3, 1, max_position_embeddings=64)  # inputs: 24 and 48
LAYERS = linears(Llama(CONFIG))
NAMES = list(LAYERS)
DIVISORS = [1, 2, 3, 4, 6, 8, 12, 24]
TOKENS = torch.arange(30).view(2, 15)
QUICK = settings(max_examples=25)


def quantized_model(bits=4, group_sizes=(4,), seed=0):
    """(a model whose layers have groups of these sizes, {layer: its Quantized})."""
    torch.manual_seed(seed)
    model, parts = Llama(CONFIG), {}
    for i, (name, layer) in enumerate(linears(model).items()):
        group_size = group_sizes[i % len(group_sizes)]
        shape = layer.out_features, layer.in_features // group_size, group_size
        parts[name] = random_quantized(seed + 3 * i, *shape, bits)
        model.set_submodule(name, QuantLinear.from_quantized(parts[name], bits))
    return model.requires_grad_(False), parts


def factors(name, rank, size, seed=0, dtype=torch.float32):
    """Random A [R, I / size] and B [O, R] of a layer."""
    a = normal(seed, rank, LAYERS[name].in_features // size)
    return a.to(dtype), normal(seed + 1, LAYERS[name].out_features, rank).to(dtype)


def save(folder, tensors, **fields):
    """Writes an adapter's folder: {layer: (A, B)} and the fields of its config."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    named = {}
    for name, (a, b) in tensors.items():
        named[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        named[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    if fields.get("inference_mode"):  # a field without a meaning here chooses the kind of file
        torch.save(named, folder / "adapter_model.bin")
    else:
        safetensors.torch.save_file(named, folder / "adapter_model.safetensors")


def library_forward(x, weight, a, b, size, scaling, authors):
    """x [N, I] times a dense weight, and the adapter beside it, in float64."""
    if authors:
        pooled = torch.nn.functional.avg_pool1d(x, size)
    else:  # PEFT multiplies by the number of groups
        pooled = x.view(len(x), -1, size).mean(dim=2) * (x.shape[1] // size)
    return x @ weight.t() + pooled @ a.double().t() @ b.double().t() * scaling


def assert_merged(layer, part, a, b, size, scaling, authors):
    """That a merged layer has the codes and scales of `part`, and computes as the library.

    offset + s * B @ A has R + 4 roundings, each by at most 2^-24 of |offset| + |s| |B| |A|. What
    an offset errs meets the sum of its group's inputs.
    """
    base = QuantLinear.from_quantized(part, layer.bits)
    assert same([layer.packed, layer.scale], [base.packed, base.scale])
    assert layer.offset.dtype == torch.float32
    inputs, group_size = part.codes.shape[1], layer.group_size
    x = normal(5, 7, inputs)
    expected = library_forward(x, dense(part), a, b, size, scaling, authors)
    found = x @ dense(part._replace(offset=layer.offset)).t()
    moved = (
        scaling * (1 if authors else inputs // size) / size * (b.double().abs() @ a.double().abs())
    )
    magnitude = part.offset.double().abs() + moved.repeat_interleave(size // group_size, dim=1)
    rounding = (len(a) + 4) * 2**-24 * magnitude
    allowed = x.unflatten(1, (-1, group_size)).sum(-1).abs() @ rounding.t() + 1e-12
    assert ((found - expected).abs() <= allowed).all()
    assert (expected - x @ dense(part).t()).abs().max() > 10 * allowed.max(), "the bound is loose"


@st.composite
def adapters(draw):
    """Fields of a config, and what they mean."""
    size = draw(st.sampled_from(DIVISORS))
    fields = {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.sampled_from([1, 3, 16, 0.5])),
        "use_rslora": draw(st.sampled_from([True, False, None])),
        "inference_mode": draw(st.booleans()),
    }
    if draw(st.booleans()):
        fields |= {"use_qalora": True, "qalora_group_size": size}
    elif draw(st.booleans()):  # what PEFT's config has where QA-LoRA is off
        fields |= {"use_qalora": False, "qalora_group_size": 16}
    targets = draw(st.sets(st.sampled_from(LINEARS), min_size=1))
    return size, fields, sorted(targets)


@QUICK
@given(
    adapters(),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.integers(0, 2**20),
)
def test_a_merged_adapter_computes_what_its_library_does(
    tmp_path_factory, adapter, bits, dtype, seed
):
    """Groups of the adapter that are 1, 2, ... 24 times those of the base, which vary by layer."""
    size, fields, targets = adapter
    folder = tmp_path_factory.mktemp("adapter")
    fitting = [d for d in DIVISORS if size % d == 0]
    model, parts = quantized_model(bits, random.Random(seed).choices(fitting, k=5), seed)
    names = [name for name in NAMES if name.rpartition(".")[2] in targets]
    tensors = {name: factors(name, fields["r"], size, i, dtype) for i, name in enumerate(names)}
    save(folder, tensors, target_modules=targets, **fields)

    adapted = peft.load_adapter(model, folder)
    before = {name: layer.clone() for name, layer in adapted.state_dict().items()}
    outputs = adapted(TOKENS)
    merged = merge.merge(adapted)
    assert torch.equal(merged(TOKENS), outputs)
    root = fields["r"] ** 0.5 if fields["use_rslora"] else fields["r"]
    scaling, authors = fields["lora_alpha"] / root, not fields.get("use_qalora")
    for name, layer in linears(merged).items():
        if name in tensors:
            rounded = [t.float() for t in tensors[name]]  # float64 is rounded to float32
            assert_merged(layer, parts[name], *rounded, size, scaling, authors)
        else:
            assert torch.equal(layer.offset, before[f"{name}.offset"])


# Keys of rank_pattern and alpha_pattern, and the layers they mean: the end of a name, from a dot on
PATTERNS = {
    "q_proj": [name for name in NAMES if name.endswith(".q_proj")],
    "layers.1.mlp.down_proj": ["model.layers.1.mlp.down_proj"],
    "model.layers.0.self_attn.k_proj": ["model.layers.0.self_attn.k_proj"],
    r".*\.0\.mlp\..*": [name for name in NAMES if ".0.mlp." in name],
    "up_proj|v_proj": [name for name in NAMES if "up_proj" in name or "v_proj" in name],
    r"mlp\.\w+": [name for name in NAMES if ".mlp." in name],
    "proj": [],
    "layers.1": [],
}
VALUES = st.dictionaries(st.sampled_from(list(PATTERNS)), st.integers(1, 5), max_size=3)


@QUICK
@given(VALUES, VALUES, st.booleans(), st.booleans())
def test_patterns_give_layers_their_own_rank_and_alpha(
    tmp_path_factory, ranks, alphas, rslora, authors
):
    """The first pattern that matches; without any, the config's r and lora_alpha."""
    folder = tmp_path_factory.mktemp("adapter")
    model, parts = quantized_model()

    def value(patterns, name, usual):
        return next((v for key, v in patterns.items() if name in PATTERNS[key]), usual)

    tensors = {}
    for i, name in enumerate(NAMES):
        tensors[name] = factors(name, value(ranks, name, 2), 8, i)
    kind = {} if authors else {"use_qalora": True, "qalora_group_size": 8}
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    save(folder, tensors, r=2, lora_alpha=7, **patterns, **kind)
    merged = linears(merge.merge(peft.load_adapter(model, folder)))
    for name in NAMES:
        rank = value(ranks, name, 2)
        scaling = value(alphas, name, 7) / (rank**0.5 if rslora else rank)
        assert_merged(merged[name], parts[name], *tensors[name], 8, scaling, authors)


# ---- the command


FIELDS = {"r": 2, "lora_alpha": 16, "use_qalora": True, "qalora_group_size": 8}
FIELDS |= {"base_model_name_or_path": "somebody/gptq", "target_modules": ["q_proj", "down_proj"]}
TARGETED = [name for name in NAMES if name.endswith(("q_proj", "down_proj"))]
Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a quantized model, base, and an adapter over it, adapter."""
    folder = tmp_path_factory.mktemp("peft")
    save_quantized(quantized_model()[0], folder / "base")
    train_tokenizer(["merging keeps every bit"], folder / "base" / "tokenizer.model", 275)
    save(folder / "adapter", {name: factors(name, 2, 8) for name in TARGETED}, **FIELDS)
    return folder


@pytest.fixture
def here(written, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(written, tmp_path / "here")


@pytest.fixture
def command(monkeypatch, capsys, here):
    """A function that runs merge.py, by default over `here`: (status, stdout, stderr)."""

    def run(base="base"):
        capsys.readouterr()
        options = ["--base", here / base, "--adapter", here / "adapter", "--out", here / "out"]
        return run_in_process(monkeypatch, capsys, merge.main, *options)

    return run


def adapted_model(here, base="base"):
    return peft.load_adapter(formats.load_model(here / base), here / "adapter")


def test_the_command_writes_a_model_folder_with_the_adapted_models_bits(here, command):
    (here / "adapter" / "tokenizer.model").write_bytes(b"not the base's")
    (here / "base" / "mlx.safetensors").write_bytes(b"what export.py writes back")
    before = contents(here)
    expected = adapted_model(here)(TOKENS)
    status, said, _ = command()
    assert (status, said) == (0, f"merged {here / 'adapter'} into {here / 'out'}\n")
    found = " ".join(sorted(map(str, contents(here / "out"))))
    assert found == "config.json mlx.safetensors model.safetensors tokenizer.model"
    for name in ("mlx.safetensors", "tokenizer.model"):
        assert (here / "out" / name).read_bytes() == (here / "base" / name).read_bytes()
    assert formats.quantization_of(here / "out")["group_size"] == 4
    merged = formats.load_model(here / "out")
    assert torch.equal(merged(TOKENS), expected)
    assert not torch.equal(expected, formats.load_model(here / "base")(TOKENS))
    assert {type(layer) for layer in linears(merged).values()} == {QuantLinear}
    assert {path: (here / path).read_bytes() for path in before} == before
    assert command()[0] == 2, "nothing is overwritten"


def test_a_merged_model_can_take_another_adapter(here, command):
    assert command()[0] == 0
    (here / "out").rename(here / "once")
    twice = adapted_model(here, "once")
    assert all(type(linears(twice)[name]) is QALoRALinear for name in TARGETED)
    assert command("once")[0] == 0
    assert torch.equal(formats.load_model(here / "out")(TOKENS), twice(TOKENS))


def test_a_gguf_file_is_a_base(tmp_path, monkeypatch, capsys, folder_of):
    """The new folder keeps what export.py needs to write that file back."""
    pytest.importorskip("gguf")
    import export

    export.export(folder_of(), tmp_path / "base.gguf")
    base = formats.load_model(tmp_path / "base.gguf")
    layer = "model.layers.1.self_attn.q_proj"
    save(tmp_path / "adapter", {layer: (normal(1, 3, 2), normal(2, 64, 3))}, r=3, lora_alpha=6)
    expected = peft.load_adapter(base, tmp_path / "adapter")(TOKENS)
    options = ["--base", tmp_path / "base.gguf", "--adapter", tmp_path / "adapter"]
    run_in_process(monkeypatch, capsys, merge.main, *options, "--out", tmp_path / "out")
    assert torch.equal(formats.load_model(tmp_path / "out")(TOKENS), expected)
    assert (tmp_path / "out" / "gguf.safetensors").exists()
    export.export(tmp_path / "out", tmp_path / "back.gguf")


@pytest.mark.parametrize(
    "options",
    ["", "--base x", "--adapter x", "run --base x", "run --adapter x", "run --base x --adapter x"],
)
def test_one_of_two_forms_is_given(tmp_path, monkeypatch, capsys, options):
    given = [*options.split(), "--out", tmp_path / "out"]
    status, said, error = run_in_process(monkeypatch, capsys, merge.main, *given)
    assert (status, said, error.count("\n")) == (2, "", 1)
    assert "name a run, or else --base MODEL and --adapter PEFT_DIR" in error


# ---- what is refused


def assert_refused(command, here, says):
    """That the command ends in one line that says it, and writes nothing."""
    before = contents(here)
    status, said, error = command()
    assert (status, said, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ") and says in error, error
    assert contents(here) == before


def change_config(here, **changes):
    """Changes fields of the adapter's config; None removes one."""
    file = here / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"peft_type": "ADALORA"}, 'peft_type = "ADALORA" is not supported, only LORA is'),
        ({"peft_type": None}, "peft_type = null"),
        ({"r": None}, "r = null is not a sensible int"),
        ({"r": "2"}, 'r = "2"'),
        ({"r": True}, "r = true"),
        ({"r": 2.0}, "r = 2.0"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": -1}, "lora_alpha = -1 is not a sensible float"),
        ({"lora_alpha": None}, "lora_alpha = null"),
        ({"lora_alpha": float("nan")}, "lora_alpha = NaN"),
        ({"lora_alpha": 1e300}, "lora_alpha = 1e+300"),
        ({"use_qalora": "no"}, 'use_qalora = "no"'),
        ({"use_rslora": []}, "use_rslora = []"),
        ({"qalora_group_size": None}, "qalora_group_size = null"),
        ({"qalora_group_size": 0}, "qalora_group_size = 0"),
        ({"rank_pattern": [8]}, "rank_pattern = [8] is no JSON object"),
        ({"rank_pattern": {"q": 1.5}}, 'rank_pattern["q"] = 1.5'),
        ({"alpha_pattern": {"q": 0}}, 'alpha_pattern["q"] = 0'),
        ({"alpha_pattern": {"(": 1}}, 'alpha_pattern has "("'),
        ({"use_dora": True}, "use_dora = true is not supported"),
        ({"use_bdlora": {"nblocks": 3}, "use_qalora": False}, "use_bdlora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"target_modules": ["q_proj", "up_proj"]}, "target_modules names model.layers.0.mlp.up_"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(here, command, changes, says):
    change_config(here, **changes)
    assert_refused(command, here, f"adapter/adapter_config.json: {says}")


def filled(*shape, value=1.0, dtype=torch.float32):
    return torch.full(shape, value, dtype=dtype)


def pair(layer):
    return {f"base_model.model.{layer}.lora_{x}.weight": filled(1, 1) for x in "AB"}


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({A: None}, f"{A} is missing"),
        ({B: None}, f"{B} is missing"),
        ({f"{Q}.lora_B.bias": filled(24)}, f"{Q}.lora_B.bias cannot be merged"),
        ({f"{Q}.lora_B.weight.absmax": filled(24)}, "lora_B.weight.absmax cannot be merged"),
        ({f"{Q}.lora_magnitude_vector": filled(24)}, "lora_magnitude_vector cannot be merged"),
        ({f"{Q}.lora_embedding_A": filled(2, 24)}, "lora_embedding_A cannot be merged"),
        ({f"{Q}.lora_A.other.weight": filled(2, 3)}, "lora_A.other.weight cannot be merged"),
        ({"base_model.model.lm_head.weight": filled(1)}, "model.lm_head.weight cannot be merged"),
        ({"model.norm.lora_A.weight": filled(1, 1)}, "model.norm.lora_A.weight cannot be merged"),
        (pair("model.layers.2.mlp.up_proj"), "the base has no layer model.layers.2.mlp.up_proj;"),
        (pair("lm_head"), "lora_A.weight: lm_head is not quantized in the base"),
        ({A: filled(2, 3, value=torch.nan)}, f"{A} has NaN or infinite values"),
        ({B: filled(24, 2, value=torch.inf)}, f"{B} has NaN or infinite values"),
        ({B: filled(24, 2, dtype=torch.int64)}, f"{B} holds torch.int64"),
        (
            {A: filled(3, 3)},
            f"{A} has the shape [3, 3], but base and adapter_config.json ask for [",
        ),
        (
            {A: filled(2, 4)},
            f"{A} has the shape [2, 4], but base and adapter_config.json ask for [",
        ),
        ({A: filled()}, f"{A} has the shape [], but "),
        ({A: filled(2, 0)}, f"{A} has the shape [2, 0], but "),
        ({B: filled(8, 2)}, f"{B} has the shape [8, 2], but "),
        ({B: filled(24, 3)}, f"{B} has the shape [24, 3], but "),
        ({A: filled(2, 24)}, f"{A} is as wide as the 24 inputs: plain LoRA changes"),
        ({A: filled(2, 3, value=1e30), B: filled(24, 2, value=1e30)}, "q_proj overflow float32"),
        ({B: filled(24, 2, value=1e300, dtype=torch.float64)}, "q_proj overflow float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(here, command, changes, says):
    file = here / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file) | changes
    kept = {name: t.clone() for name, t in tensors.items() if t is not None}
    file.unlink()  # what is loaded is mapped
    safetensors.torch.save_file(kept, file)
    assert_refused(command, here, says)


@pytest.mark.parametrize(
    "size, authors, says",
    [
        (6, False, "A.weight sees means of 6 of the 24 inputs, which are not whole groups of 4 as"),
        (2, False, "means of 2 of the 24 inputs"),
        (16, False, "means of 16 of the 24 inputs"),
        (2, True, "means of 2 of the 24 inputs"),
        (1, True, "plain LoRA"),
        (1, False, "plain LoRA"),
    ],
)
def test_an_adapter_over_other_groups_is_refused(here, command, size, authors, says):
    a, b = filled(2, 24 // size), filled(24, 2)
    fields = {"use_qalora": not authors, "qalora_group_size": size, "target_modules": ["q_proj"]}
    save(here / "adapter", {NAMES[0]: (a, b)}, **FIELDS | fields | {"layers_to_transform": [0]})
    assert_refused(command, here, says)


@pytest.mark.parametrize("width", [0, 5, 7, 48])
def test_a_width_that_divides_no_inputs_is_of_a_wrong_shape(here, command, width):
    save(here / "adapter", {NAMES[0]: (filled(2, width), filled(24, 2))}, r=2, lora_alpha=1)
    assert_refused(command, here, f"lora_A.weight has the shape [2, {width}], but base and ")


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("adapter_config.json", None, "adapter_config.json: no such file"),
        ("adapter_config.json", 1, "adapter_config.json: not valid JSON"),
        ("adapter_model.safetensors", None, "adapter: found no adapter_model.safetensors or ad"),
        ("adapter_model.safetensors", 4, "adapter_model.safetensors: not a file of weights, or tr"),
        (
            "adapter_model.safetensors",
            -1,
            "adapter_model.safetensors: not a file of weights, or tr",
        ),
        ("adapter_model.bin", {A: Executed()}, "adapter_model.bin: not a file of weights"),
        ("adapter_model.bin", {1: filled(1)}, "adapter_model.bin: tensor 1 cannot be merged"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(
    here, command, monkeypatch, name, content, says
):
    monkeypatch.chdir(here)  # where a pickle would leave its mark
    file = here / "adapter" / name
    if isinstance(content, dict):
        (here / "adapter" / "adapter_model.safetensors").unlink()
        torch.save(content, file)
    elif content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:content])
    assert_refused(command, here, says)


def a_model_in_nf4(base):
    save_quantized(quantize_model_nf4(Llama(CONFIG)), base, quantizer="nf4")


def a_float_layer(base):
    model = quantized_model()[0]
    model.set_submodule("model.layers.1.self_attn.q_proj", torch.nn.Linear(24, 24, bias=False))
    save_quantized(model, base)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda base: save_pretrained(Llama(CONFIG), base), 'config.json says "somebody/gptq")'),
        (a_model_in_nf4, "base is not quantized in groups with offsets; quantize it first"),
        (a_float_layer, f"{A}: model.layers.1.self_attn.q_proj is not quantized in the base"),
        (shutil.rmtree, "base; name a model or a run"),
        (lambda base: os.truncate(base / "model.safetensors", 5000), "base/model.safetensors: not"),
        (lambda base: (base / "tokenizer.model").unlink(), "tokenizer"),
    ],
)
def test_a_base_that_cannot_take_an_adapter_is_refused(here, command, damage, says):
    damage(here / "base")
    assert_refused(command, here, says)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["up_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": None},
    ],
)
def test_layers_chosen_in_other_ways_need_not_all_have_tensors(here, changes):
    change_config(here, **{"target_modules": ["q_proj", "up_proj", "down_proj"]} | changes)
    layers = linears(adapted_model(here))
    assert [name for name in NAMES if isinstance(layers[name], QALoRALinear)] == TARGETED
