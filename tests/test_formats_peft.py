"""QA-LoRA adapters in PEFT's folders: merged, they compute what their libraries' forward does.

That forward pass stands here by hand in float64, from the sources that formats/peft.py names. That
the libraries agree is checked with the libraries themselves in tests/check_peft_part.py.
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
from formats.quantized import save_quantized
from llama import LINEARS, Llama, LlamaConfig
from qalora import QALoRALinear
from quant import QuantLinear
from text.tokenizer import train_tokenizer

CONFIG = LlamaConfig(300, 24, 48, 2, 3, 1, max_position_embeddings=64)  # inputs: 24 and 48
NAMES = list(linears(Llama(CONFIG)))
SIZES = {name: (48 if "down" in name else 24, {"k": 8, "v": 8}.get(name[-6], 24)) for name in NAMES}
SIZES |= {name: (24, 48) for name in NAMES if "gate" in name or "up" in name}  # (inputs, outputs)
DIVISORS = [1, 2, 3, 4, 6, 8, 12, 24]
TOKENS = torch.arange(30).view(2, 15)
QUICK = settings(max_examples=25)


def quantized_model(bits=4, group_sizes=(4,), seed=0):
    """(a model whose layers have groups of these sizes, {layer: its Quantized})."""
    torch.manual_seed(seed)
    model, parts = Llama(CONFIG), {}
    for i, name in enumerate(NAMES):
        group_size = group_sizes[i % len(group_sizes)]
        inputs, outputs = SIZES[name]
        part = random_quantized(seed + 3 * i, outputs, inputs // group_size, group_size, bits)
        parts[name] = part
        model.set_submodule(name, QuantLinear.from_quantized(part, bits))
    return model.requires_grad_(False), parts


def factors(name, rank, size, seed=0, dtype=torch.float32):
    """Random A [R, I / size] and B [O, R] of a layer."""
    inputs, outputs = SIZES[name]
    a, b = normal(seed, rank, inputs // size), normal(seed + 1, outputs, rank)
    return a.to(dtype), b.to(dtype)


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
    pools = x.shape[1] // size
    pooled = x.view(-1, pools, size).mean(dim=2)
    if not authors:
        pooled = pooled * pools  # as QALoraLinearVariant.forward has it
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


FIELDS = {
    "r": 2,
    "lora_alpha": 16,
    "use_qalora": True,
    "qalora_group_size": 8,
    "base_model_name_or_path": "somebody/llama-gptq",
    "target_modules": ["q_proj", "down_proj"],
}
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
    found = contents(here / "out")
    assert sorted(map(str, found)) == [
        "config.json",
        "mlx.safetensors",
        "model.safetensors",
        "tokenizer.model",
    ]
    for name in ("mlx.safetensors", "tokenizer.model"):
        assert (here / "out" / name).read_bytes() == (here / "base" / name).read_bytes()
    assert formats.quantization_of(here / "out") == {"bits": 4, "group_size": 4}
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


def config(**changes):
    """Changes fields of the config; None removes one."""

    def damage(folder):
        file = folder / "adapter_config.json"
        fields = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))

    return damage


def tensors(**changes):
    """Changes tensors of a layer: replaces one by another, or takes it away by None."""

    def damage(folder):
        file = folder / "adapter_model.safetensors"
        found = safetensors.torch.load_file(file)
        for name, tensor in changes.items():
            name = name if "model." in name else f"{Q}.{name.replace('__', '.')}"
            found.pop(name, None)
            if tensor is not None:
                found[name] = tensor
        file.unlink()
        safetensors.torch.save_file(found, file)

    return damage


def pair(layer):
    return {f"base_model.model.{layer}.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}


def gone(name):
    return lambda folder: (folder / name).unlink()


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


class Executed:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def pickled(content):
    def damage(folder):
        (folder / "adapter_model.safetensors").unlink()
        torch.save(content, folder / "adapter_model.bin")

    return damage


def both(first, second):
    return lambda folder: (first(folder), second(folder))[1]


NAN = torch.tensor([[0.0] * 3, [0.0, 0.0, torch.nan]])
CONFIG_FILE, FILE = "adapter/adapter_config.json: ", "adapter/adapter_model.safetensors: "
A, B = f"{FILE}tensor {Q}.lora_A.weight", f"{FILE}tensor {Q}.lora_B.weight"
PLAIN = dict(use_qalora=False, qalora_group_size=16)


@pytest.mark.parametrize(
    "damage, says",
    [
        (gone("adapter_config.json"), CONFIG_FILE + "no such file"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            CONFIG_FILE + "not valid",
        ),
        (config(peft_type="ADALORA"), CONFIG_FILE + 'peft_type = "ADALORA"'),
        (config(peft_type=None), CONFIG_FILE + "peft_type = null"),
        (config(r=None), CONFIG_FILE + "r = null is not a sensible int"),
        (config(r="2"), CONFIG_FILE + 'r = "2"'),
        (config(r=True), CONFIG_FILE + "r = true"),
        (config(r=2.0), CONFIG_FILE + "r = 2.0"),
        (config(r=0), CONFIG_FILE + "r = 0"),
        (config(lora_alpha=-1), CONFIG_FILE + "lora_alpha = -1 is not a sensible float"),
        (config(lora_alpha=None), CONFIG_FILE + "lora_alpha = null"),
        (config(lora_alpha=float("nan")), CONFIG_FILE + "lora_alpha = NaN"),
        (config(lora_alpha=1e300), CONFIG_FILE + "lora_alpha = 1e+300"),
        (config(use_qalora="no"), CONFIG_FILE + 'use_qalora = "no"'),
        (config(use_rslora=[]), CONFIG_FILE + "use_rslora = []"),
        (config(qalora_group_size=None), CONFIG_FILE + "qalora_group_size = null"),
        (config(qalora_group_size=0), CONFIG_FILE + "qalora_group_size = 0"),
        (config(rank_pattern=[8]), CONFIG_FILE + "rank_pattern = [8] is no JSON object"),
        (config(rank_pattern={"q": 1.5}), CONFIG_FILE + 'rank_pattern["q"] = 1.5'),
        (config(alpha_pattern={"q": 0}), CONFIG_FILE + 'alpha_pattern["q"] = 0'),
        (config(alpha_pattern={"(": 1}), CONFIG_FILE + 'alpha_pattern has "("'),
        (config(use_dora=True), CONFIG_FILE + "use_dora = true is not supported"),
        (config(use_bdlora={"nblocks": 3}, **PLAIN), CONFIG_FILE + "use_bdlora"),
        (config(lora_bias=True), CONFIG_FILE + "lora_bias"),
        (config(modules_to_save=["lm_head"]), CONFIG_FILE + "modules_to_save"),
        (config(layer_replication=[[0, 1], [0, 1]]), CONFIG_FILE + "layer_replication"),
        (config(alora_invocation_tokens=[1]), CONFIG_FILE + "alora_invocation_tokens"),
        (config(target_modules=["q_proj", "up_proj"]), "names model.layers.0.mlp.up_proj"),
        (gone("adapter_model.safetensors"), "adapter: found no adapter_model.safetensors or ad"),
        (cut, FILE + "not a file of weights, or truncated"),
        (pickled({f"{Q}.lora_A.weight": Executed()}), "adapter_model.bin: not a file of weights"),
        (pickled({1: torch.zeros(1)}), "adapter_model.bin: tensor 1 cannot be merged"),
        (tensors(lora_A__weight=None), A + " is missing"),
        (tensors(lora_B__weight=None), B + " is missing"),
        (tensors(lora_B__bias=torch.zeros(24)), f"{Q}.lora_B.bias cannot be merged"),
        (tensors(lora_magnitude_vector=torch.zeros(24)), "lora_magnitude_vector cannot be merged"),
        (tensors(lora_embedding_A=torch.zeros(2, 24)), "lora_embedding_A cannot be merged"),
        (tensors(lora_A__other__weight=NAN), "lora_A.other.weight cannot be merged"),
        (tensors(**{"base_model.model.lm_head.weight": NAN}), "lm_head.weight cannot be merged"),
        (tensors(**{"model.norm.lora_A.weight": NAN}), "model.norm.lora_A.weight cannot be merged"),
        (
            tensors(**pair("model.layers.2.mlp.up_proj")),
            "the base has no layer model.layers.2.mlp.up",
        ),
        (tensors(**pair("lm_head")), "lora_A.weight: lm_head is not quantized in the base"),
        (tensors(lora_A__weight=NAN), A + " has NaN or infinite values"),
        (tensors(lora_B__weight=torch.full((24, 2), torch.inf)), B + " has NaN or infinite"),
        (tensors(lora_B__weight=torch.ones(24, 2).long()), B + " holds torch.int64"),
        (tensors(lora_A__weight=torch.ones(3, 3)), A + " has the shape [3, 3], but "),
        (tensors(lora_A__weight=torch.ones(2, 4)), A + " has the shape [2, 4], but "),
        (tensors(lora_A__weight=torch.ones(())), A + " has the shape [], but "),
        (tensors(lora_A__weight=torch.ones(2, 0)), A + " has the shape [2, 0], but "),
        (tensors(lora_B__weight=torch.ones(8, 2)), B + " has the shape [8, 2], but "),
        (
            tensors(lora_B__weight=torch.ones(24, 3)),
            "[24, 3], but base and adapter_config.json ask",
        ),
        (both(config(**PLAIN), tensors(lora_A__weight=torch.ones(2, 5))), "ask for [2, 6]"),
        (both(config(**PLAIN), tensors(lora_A__weight=torch.ones(()))), "ask for [2, 6]"),
        (tensors(lora_A__weight=torch.ones(2, 24)), A + " is as wide as the 24 inputs: plain LoRA"),
        (both(config(**PLAIN), tensors(lora_A__weight=torch.ones(2, 24))), "plain LoRA"),
        (config(qalora_group_size=6), "sees means of 6 of the 48 inputs"),
        (config(qalora_group_size=32), "sees means of 32 of the 48 inputs"),
        (config(qalora_group_size=2), "not whole groups of 4"),
        (
            both(config(**PLAIN), tensors(lora_A__weight=torch.ones(2, 12))),
            "means of 2 of the 24",
        ),
        (
            tensors(
                lora_A__weight=torch.full((2, 3), 1e30), lora_B__weight=torch.full((24, 2), 1e30)
            ),
            "offsets of model.layers.1.self_attn.q_proj overflow float32",
        ),
        (
            tensors(lora_B__weight=torch.full((24, 2), 1e300, dtype=torch.float64)),
            "overflow float32",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_ends_in_one_line_and_leaves_nothing(
    here, command, monkeypatch, damage, says
):
    monkeypatch.chdir(here)
    damage(here / "adapter")
    before = contents(here)
    status, said, error = command()
    assert (status, said, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ") and says in error, error
    assert contents(here) == before and not (here / "executed").exists()


def a_float_model(base):
    formats.huggingface.save_pretrained(Llama(CONFIG), base)


def a_model_in_nf4(base):
    save_quantized(quantize_model_nf4(Llama(CONFIG)), base, quantizer="nf4")


def a_float_layer(base):
    model = quantized_model()[0]
    model.set_submodule("model.layers.1.self_attn.q_proj", torch.nn.Linear(24, 24, bias=False))
    save_quantized(model, base)


@pytest.mark.parametrize(
    "damage, says",
    [
        (a_float_model, 'adapter_config.json says "somebody/llama-gptq")'),
        (a_model_in_nf4, "base is not quantized in groups with offsets; quantize it first"),
        (a_float_layer, A + ": model.layers.1.self_attn.q_proj is not quantized in the base"),
        (shutil.rmtree, "base: found none of"),
        (gone("tokenizer.model"), "tokenizer"),
    ],
)
def test_a_base_that_cannot_take_an_adapter_is_refused(here, command, damage, says):
    damage(here / "base")
    before = contents(here)
    status, said, error = command()
    assert (status, said, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ") and says in error, error
    assert contents(here) == before


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
    config(**{"target_modules": ["q_proj", "up_proj", "down_proj"]} | changes)(here / "adapter")
    layers = linears(adapted_model(here))
    assert [name for name in NAMES if isinstance(layers[name], QALoRALinear)] == TARGETED
