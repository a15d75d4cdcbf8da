"""QA-LoRA adapters that others trained over a quantized model, in the folders that PEFT saves.

adapter_config.json has rank and alpha; adapter_model.safetensors or .bin has, of every adapted
layer, lora_A [R, P] and lora_B [O, R]. A sees P numbers: the means of x over P groups of g inputs,
P * g = I. With s = alpha / r (or alpha / sqrt(r) with use_rslora) and w = scale * code + offset:

    PEFT       y += s * P * mean(x) @ A^T @ B^T    so    offset += s * P / g * B @ A
    authors    y += s * mean(x) @ A^T @ B^T        so    offset += s / g * B @ A

PEFT, with "use_qalora" in its config: QALoraLinearVariant.forward in peft/tuners/lora/variants.py
(0.21.2). It multiplies by the number of groups; algorithm 1 of the paper, by their size. The
authors', without it: GPTQLoraLinear.forward in peft_utils.py of github.com/yuhuixu1993/qa-lora
(14bc300; "sum operation" is said of an AvgPool1d), and s / g in its merge.py.

Here the adapter becomes QALoRALinears: A's columns are repeated where g is several of the base's
groups, which is exact, and alpha takes the factor. Merging is then that of our own adapters.
"""

import functools
import json
import math
import pathlib
import re
from typing import Any

import formats
from cli.errors import UserError
from cli.files import read_json, written_whole
from formats import quantized
from formats.files import Stored, all_finite, open_file
from formats.huggingface import read_float
from llama import Llama, linears
from merge import merge
from qalora import QALoRALinear
from quant import QuantLinear

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FACTOR = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
# Fields that make more of an adapter than B @ A, or another matrix of A
UNSUPPORTED = (
    "use_dora",
    "use_bdlora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
)


def save_merged(
    base: str | pathlib.Path, adapter: str | pathlib.Path, folder: str | pathlib.Path
) -> None:
    """Writes the quantized model at `base` with a PEFT adapter merged in, as a model folder.

    Raises UserError where the base is not quantized in groups, and as `load_adapter` does.
    """
    adapter, config = pathlib.Path(adapter), read_config(pathlib.Path(adapter))
    kind = formats.quantization_of(base)
    if kind is None or kind.get("quantizer") == "nf4":
        trained_over = json.dumps(config.get("base_model_name_or_path"))
        raise UserError(
            f"{base} is not quantized in groups with offsets; quantize it first, or name the GPTQ "
            f"folder that the adapter was trained over ({adapter / CONFIG} says {trained_over})"
        )
    formats.check(base)
    tokenizer = formats.load_tokenizer(base)
    with written_whole(folder) as beside:
        beside.mkdir()
        formats.import_base(base, beside)  # also what export.py needs of another format's file
        tokenizer.save(beside)
        merged = merge(load_adapter(quantized.load_model(beside), adapter))
        quantized.save_quantized(merged, beside)


def load_adapter(model: Llama, folder: str | pathlib.Path) -> Llama:
    """Puts the adapter of a PEFT folder onto the layers of a quantized model, in place.

    Returns the model. Raises UserError naming file and tensor where the adapter is damaged, of
    another model, or more than a change of offsets.
    """
    folder = pathlib.Path(folder)
    config, factors = read_config(folder), unfused(open_factors(folder), model)
    check_targets(folder / CONFIG, config, model, factors)
    modules = dict(model.named_modules())
    for name, pair in factors.items():
        a = pair["lora_A"]
        if name not in modules:
            raise UserError(
                f"{a.file}: tensor {a.name}: the base has no layer {name}; this is the adapter of "
                "another model"
            )
        if not isinstance(modules[name], QuantLinear):
            raise UserError(
                f"{a.file}: tensor {a.name}: {name} is not quantized in the base, and only offsets "
                "can take an adapter in"
            )
        model.set_submodule(name, adapted_layer(modules[name], name, pair, config))
    return model


def adapted_layer(
    base: QuantLinear, name: str, pair: dict[str, Stored], config: dict
) -> QALoRALinear:
    """`base` with the two stored factors of the layer `name`; UserError where they do not fit."""
    a, b = pair["lora_A"], pair["lora_B"]
    rank = value_for(name, config, "r", "rank_pattern")
    alpha = value_for(name, config, "lora_alpha", "alpha_pattern")
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)  # QALoRALinear divides by the rank
    size = pooled_inputs(base, a, config)
    pools = base.in_features // size
    if config.get("use_qalora"):
        alpha *= pools
    for stored, wanted in ((a, (rank, pools)), (b, (base.out_features, rank))):
        if stored.shape != wanted:
            raise UserError(
                f"{stored.file}: tensor {stored.name} has the shape {list(stored.shape)}, but base "
                f"and {CONFIG} ask for {list(wanted)}"
            )
    layer = QALoRALinear(base, rank, alpha / size)
    repeats = size // base.group_size
    layer.lora_A.data = read_float(a).float().repeat_interleave(repeats, dim=1)
    layer.lora_B.data = read_float(b).float()
    if not all_finite(layer.effective_offset().detach()):
        raise UserError(f"{b.file}: tensor {b.name}: with it, offsets of {name} overflow float32")
    return layer


def pooled_inputs(base: QuantLinear, a: Stored, config: dict) -> int:
    """How many inputs each number that A sees is the mean of; UserError for plain LoRA.

    Without "use_qalora" the shapes tell: A is then as wide as the layer has pools.
    """
    inputs, width = base.in_features, a.shape[-1] if a.shape else 0
    if width == inputs and base.group_size > 1:
        raise UserError(
            f"{a.file}: tensor {a.name} is as wide as the {inputs} inputs: plain LoRA changes each "
            "weight by its own amount, which codes with one scale and offset for a group cannot "
            "hold; merge it into a float model, or fine-tune again with QA-LoRA"
        )
    if config.get("use_qalora"):
        size = config["qalora_group_size"]
    else:  # a width that does not divide the inputs is then of the wrong shape
        size = inputs // width if width and inputs % width == 0 else base.group_size
    if inputs % size or size % base.group_size:
        raise UserError(
            f"{a.file}: tensor {a.name} sees means of {size} of the {inputs} inputs, which are not "
            f"whole groups of {base.group_size} as the base has them; it was trained over another "
            "base, or cannot be merged"
        )
    return size


# ---- the two files


def read_config(folder: pathlib.Path) -> dict:
    """The fields of adapter_config.json; UserError for what is missing, invalid or unsupported."""
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{file}: no such file; name a folder that PEFT saved an adapter in")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        kind = json.dumps(config.get("peft_type"))
        raise UserError(f"{file}: peft_type = {kind} is not supported, only LORA is")
    for field in UNSUPPORTED:
        if config.get(field):
            value = json.dumps(config[field])
            raise UserError(f"{file}: {field} = {value} is not supported; offsets cannot hold it")
    for field in ("use_qalora", "use_rslora"):
        if config.get(field) not in (None, False, True):
            raise UserError(f"{file}: {field} = {json.dumps(config[field])} is no true or false")
    _check_number(file, "r", config.get("r"), int)
    _check_number(file, "lora_alpha", config.get("lora_alpha"), int, float)
    if config.get("use_qalora"):
        _check_number(file, "qalora_group_size", config.get("qalora_group_size"), int)
    _check_pattern(file, "rank_pattern", config, int)
    _check_pattern(file, "alpha_pattern", config, int, float)
    return config


def _check_number(file, field, value, *kinds):
    if not (type(value) in kinds and 0 < value < 2**24):
        raise UserError(
            f"{file}: {field} = {json.dumps(value)} is not a sensible {kinds[-1].__name__}"
        )


def _check_pattern(file, field, config, *kinds):
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{file}: {field} = {json.dumps(pattern)} is no JSON object")
    for key, value in pattern.items():
        _check_number(file, f"{field}[{json.dumps(key)}]", value, *kinds)
        try:
            matches_layer(key, "")
        except re.error as e:
            raise UserError(
                f"{file}: {field} has {json.dumps(key)}, which is no pattern: {e}"
            ) from e


def value_for(name: str, config: dict, field: str, patterns: str) -> Any:
    """The value of a config's `field` for a layer: of the first pattern that matches, or its own.

    As LoraModel._create_and_replace in peft/tuners/lora/model.py.
    """
    for key, value in (config.get(patterns) or {}).items():
        if matches_layer(key, name):
            return value
    return config[field]


def matches_layer(key: str, name: str) -> bool:
    """Whether a pattern means a layer; as get_pattern_key in peft/utils/other.py."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def open_factors(folder: pathlib.Path) -> dict[str, dict[str, Stored]]:
    """{layer: {"lora_A": its tensor, "lora_B": its tensor}}; UserError for any other tensor."""
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder}: found no {' or '.join(WEIGHTS)}")
    factors = {}
    for name, stored in open_file(file).items():
        found = FACTOR.fullmatch(str(name))
        if not found:
            raise UserError(
                f"{file}: tensor {name} cannot be merged, only the lora_A.weight and lora_B.weight "
                "of linear layers can"
            )
        layer, factor = found.groups()
        factors.setdefault(layer, {})[factor] = stored
    for layer, pair in factors.items():
        for factor in ("lora_A", "lora_B"):
            if factor not in pair:
                raise UserError(
                    f"{file}: tensor base_model.model.{layer}.{factor}.weight is missing"
                )
    return factors


def unfused(factors: dict[str, dict[str, Stored]], model: Llama) -> dict[str, dict[str, Stored]]:
    """The same, with q, k and v in place of the one layer qkv_proj of AutoGPTQ's fused attention.

    The authors' training used that until October 2023: one A, and B with the rows of all three.
    """
    layers, found = dict(linears(model)), {}
    for name, pair in factors.items():
        stem, _, last = name.rpartition(".")
        parts = [f"{stem}.{part}" for part in ("q_proj", "k_proj", "v_proj")]
        rows = [layers[part].out_features for part in parts if part in layers]
        b = pair["lora_B"]
        if last != "qkv_proj" or len(rows) < 3 or b.shape[:1] != (sum(rows),):
            found[name] = pair
            continue
        for i, part in enumerate(parts):
            own = slice(sum(rows[:i]), sum(rows[: i + 1]))
            read = functools.partial(_read_rows, b, own)
            found[part] = {**pair, "lora_B": b._replace(shape=(rows[i], *b.shape[1:]), read=read)}
    return found


def _read_rows(stored, rows):
    return stored.read()[rows]


def check_targets(
    file: pathlib.Path, config: dict, model: Llama, factors: dict[str, dict[str, Stored]]
) -> None:
    """Raises UserError for a layer that target_modules names but no tensor adapts.

    Such an adapter is of a model with fewer layers, or incomplete. Nothing is checked where the
    config chooses layers in other ways than by the ends of their names.
    """
    targets = config.get("target_modules")
    chosen = [config.get(field) for field in ("layers_to_transform", "exclude_modules")]
    if not isinstance(targets, list) or any(choice is not None for choice in chosen):
        return
    for name, layer in linears(model):
        named = any(f".{name}".endswith(f".{target}") for target in targets)
        if named and isinstance(layer, QuantLinear) and name not in factors:
            raise UserError(
                f"{file}: target_modules names {name}, of which {file.parent} has no tensors; the "
                "adapter is incomplete, or of another model"
            )
