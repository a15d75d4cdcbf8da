"""The settings of train.py: what each means, what it defaults to, and every quick check.

Settings come from three places: the command line, run.json of the run that is resumed, and the
recipe. `read_settings` is the one place where they meet.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import typing
import unicodedata

import torch

import formats
from cli import machine
from cli.errors import Parser, UserError, positive, require_matplotlib
from cli.fetch import (
    ALPACA_DATA,
    REPOSITORIES,
    Unreachable,
    fetch_data,
    fetch_weights,
    is_repository,
)
from cli.files import read_json, written_whole
from cli.machine import check_device, default_device
from llama import CONFIGS, LINEARS, LlamaConfig
from qalora import check_targets
from quant import check_group_size
from text.instructions import read_records
from text.records import read_text
from text.templates import check_template


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run. run.json holds all but the last three."""

    model: str | None  # a name in llama.CONFIGS that the weights must match; None takes any
    weights: str | None  # a model folder or file; None means the tiny model of the toy world
    tokenizer: str | None  # a tokenizer file, where the weights have none
    data: str | None  # a file of instructions or text; None means the toy world
    template: str | None  # "alpaca" or a Jinja file; None: the model's own, else Alpaca's
    calibration: str | None  # a file for GPTQ; None means the training data
    calibration_tokens: int  # how many tokens of it at most
    out: str  # the run's folder
    method: str  # "qalora", or a baseline: "lora" or "qlora"
    bits: int  # of a code: 2, 3 or 4
    group_size: int  # inputs that share a scale and an offset
    quantizer: str  # "gptq", or "rtn": rounding to nearest
    rank: int | str  # of the adapters, or "full"
    alpha: float  # adapters are scaled by alpha / rank; one of full rank is not
    targets: str  # names of the adapted linear layers, with commas between them
    lr: float  # learning rate, constant
    clip: float  # a gradient with a greater norm is scaled down to this norm
    steps: int  # optimizer steps
    batch_size: int  # examples in a step, over all processes
    micro_batch_size: int  # examples that go through the model at once on one device
    max_length: int  # tokens of an example; a longer one loses its end
    checkpointing: int  # 1: recompute each block in the backward pass, to save memory
    paged_optimizer: int  # 1: AdamW's state pages out to host memory (CUDA only)
    save_every: int  # steps between checkpoints
    seed: int  # decides the adapters' first values and the order of the data
    device: str  # as PyTorch names it: cpu, cuda, cuda:1
    resume: bool = False  # go on from the newest checkpoint
    fresh: bool = False  # make the tiny model and the quantized base again
    plot: bool = False  # draw the loss at the end


TOY = dict(
    rank=8, lr=1.5e-3, clip=1.0, steps=400, batch_size=32, micro_batch_size=32, max_length=256
)
REAL = dict(  # the paper's, section 4.1
    rank=64, lr=2e-5, clip=0.3, steps=10_000, batch_size=16, micro_batch_size=4, max_length=512
)
# What may differ when a run is resumed: none of it changes what a step learns, but for rounding
CHANGEABLE = (
    "out",
    "steps",
    "device",
    "micro_batch_size",
    "checkpointing",
    "save_every",
    "weights",
    "tokenizer",
    "data",
    "template",
    "calibration",
)
THIS_START = ("resume", "fresh", "plot")
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
MISSING_WEIGHTS = """\
With a network, python train.py --model {model} fetches weights and data. Without one, get LLaMA
weights from Meta (llama.com) or, once you have accepted its licence, huggingface.co/meta-llama;
SmolLM2's are at huggingface.co/HuggingFaceTB, TinyLlama's at huggingface.co/TinyLlama. Put
config.json, the tokenizer (tokenizer.model or tokenizer.json) and the .safetensors files (or Meta's
own files) into one folder, such as weights/{model}, then type:
    python train.py --model {model} --weights FOLDER --data alpaca.json --out runs/{model}"""


def option_parser(description: str) -> Parser:
    """The options of train.py. None has a default: what is not typed comes from elsewhere."""
    parser = Parser(prog="train.py", description=description)
    add = parser.add_argument
    size, number = positive(int), positive(float)
    names = " ".join(CONFIGS)
    add("--model", help=f"tiny (default without --weights), or the weights' size: {names}")
    add("--weights", help="a LLaMA: a folder, a .gguf file, or ORG/NAME on Hugging Face")
    add("--tokenizer", help="its tokenizer.model or tokenizer.json, where the weights have none")
    add("--data", help="JSON, JSONL, CSV, Parquet, text; or ORG/NAME[:FILE] on Hugging Face")
    add("--template", help="alpaca, or a file in Jinja (the model's own chat template, if any)")
    add("--calibration", help="text or instructions for GPTQ (default: the training data)")
    add("--calibration-tokens", type=size, help="tokens of it at most (262144: 128 x 2048)")
    add("--out", help="the folder of the run (runs/MODEL)")
    add("--method", choices=["qalora", "lora", "qlora"], help="qalora, or one of the baselines")
    add("--bits", type=int, choices=[2, 3, 4], help="bits of a code (4)")
    add("--group-size", type=size, help="inputs that share a scale and an offset (32)")
    add("--quantizer", choices=["gptq", "rtn"], help="gptq (the default), or rounding to nearest")
    add("--rank", type=positive(int, "full"), help="of the adapters, or full (64; tiny: 8)")
    add("--alpha", type=number, help="the adapters are scaled by alpha / rank (16)")
    add("--targets", help="the layers that get one, such as q_proj,v_proj (all seven)")
    add("--lr", type=number, help="learning rate, constant (2e-5, above 13b 1e-5; tiny: 1.5e-3)")
    add("--clip", type=number, help="greatest norm of a step's gradient (0.3; tiny: 1)")
    add("--steps", type=size, help="steps of fine-tuning (10000; tiny: 400)")
    add("--batch-size", type=size, help="records in a step, over all processes (16; tiny: 32)")
    add("--micro-batch-size", type=size, help="records at once on one device (4; tiny: 32)")
    add("--max-length", type=size, help="tokens of a record at most (512; tiny: 256)")
    add("--checkpointing", type=int, choices=[0, 1], help="1: recompute blocks, to save memory")
    add("--paged-optimizer", type=int, choices=[0, 1], help="1: AdamW's state in paged memory")
    add("--save-every", type=size, help="steps between checkpoints (100)")
    add("--seed", type=int, help="decides the adapters' first values and the data's order (0)")
    add("--device", help="cpu or cuda (cuda where there is one)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--fresh", action="store_true", help="make all again, also in another run's place")
    add("--plot", action="store_true", help="draw the loss to loss.png (needs matplotlib)")
    return parser


def read_settings(description: str) -> Settings:
    """The settings of this start: the command line, else run.json (with --resume), else the recipe.

    Fetches what is named in Hugging Face's way, once all that needs no weights is checked. Raises
    UserError for anything wrong that can be seen before the first slow stage.
    """
    parser = option_parser(description)
    given = typed(parser.parse_args())
    for name, value in given.items():
        if value == "":  # such as an unset variable of the shell
            raise UserError(f"{option(name)} is empty; give it a value or leave it out")
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in str(value)):
            raise UserError(  # a control character, or a byte that is no UTF-8
                f"{option(name)} {value!r} has characters that cannot be printed; rename it"
            )
    this_start = {name: given.pop(name) for name in THIS_START}
    if this_start["resume"] and this_start["fresh"]:
        raise UserError(
            "--resume goes on with what --fresh would make again; leave out one of them"
        )
    if this_start["plot"]:
        require_matplotlib()
    values = resumed(given, parser) if this_start["resume"] else recipe(given)
    settings = Settings(**values, **this_start)
    check(settings)
    if settings.paged_optimizer and not settings.device.startswith("cuda"):
        where = f"on --device {settings.device} there is nothing to page"
        print(f"--paged-optimizer: {where}; plain AdamW is used")
        settings = dataclasses.replace(settings, paged_optimizer=0)
    return settings


def typed(arguments: argparse.Namespace) -> dict:
    """What was typed on the command line."""
    return {name: value for name, value in vars(arguments).items() if value is not None}


def option(name: str) -> str:
    """The option of a setting: "group_size" is "--group-size"."""
    return f"--{name.replace('_', '-')}"


def recipe(given: dict) -> dict:
    """What was typed and, of the other settings, the defaults: for real weights the paper's.

    Fetches the weights of a size and Alpaca from Hugging Face where neither is named or here.
    """
    model = given.get("model") or (None if "weights" in given else "tiny")
    if model not in (None, *CONFIGS):
        raise UserError(f"unknown --model {model}; choose one of {', '.join(CONFIGS)}")
    values = dict(
        model=model,
        weights=given.get("weights"),
        tokenizer=None,
        data=None,
        template=None,
        calibration=None,
        calibration_tokens=2**18,
        out=default_out(given),
        method="qalora",
        bits=4,
        group_size=32,
        quantizer="gptq",
        alpha=16.0,
        targets=",".join(LINEARS),
        checkpointing=0,
        paged_optimizer=0,
        save_every=100,
        seed=0,
        device=default_device(),
    )
    if model == "tiny" and "weights" not in given:
        values |= {**TOY, **given}
        check_alone(values, given)
        return {**values, **fetched(given)}
    values |= {**REAL, "checkpointing": 1}
    check_alone({**values, **given}, given)
    if not pathlib.Path(given.get("weights") or f"weights/{model}").exists():
        given = given | checked_before_weights(given, model)
    weights = weights_of(given, model)
    kept = formats.quantization_of(weights) or {}
    for name in ("quantizer", "calibration", "calibration_tokens"):
        if kept and name in given:
            raise UserError(f"{option(name)} has no effect: {weights} is quantized; leave it out")
    values |= {name: kept[name] for name in ("bits", "group_size") if name in kept}
    config = formats.read_config(weights)
    if config.hidden_size > CONFIGS["13b"].hidden_size:
        values["lr"] = 1e-5
    values["max_length"] = min(values["max_length"], config.max_position_embeddings)
    values |= {"data": ALPACA_DATA, **given, "weights": weights}
    return {**values, **fetched({"data": values["data"]})}


def checked_before_weights(given: dict, model: str | None) -> dict:
    """{"data": local path} of what was typed; checks all it can before gigabytes are fetched.

    Raises UserError for bad data, and for a group size that does not fit the size `model`.
    """
    if model in CONFIGS and given.get("method", "qalora") == "qalora":
        check_group_size(CONFIGS[model], given.get("group_size", 32))
    if not given.get("data"):
        return {}
    data = {"data": given["data"], **fetched({"data": given["data"]})}
    read_records(data["data"])
    return data


def weights_of(given: dict, model: str | None) -> str:
    """Where the weights are: as typed, or in weights/MODEL, or in the cache, once fetched.

    Raises UserError where there are none, and Unreachable where there might be with a network.
    """
    weights = given.get("weights") or f"weights/{model}"
    if pathlib.Path(weights).exists():
        return weights
    where_to_get_them = MISSING_WEIGHTS.format(model=model or "7b")
    if "weights" not in given:
        try:
            return str(fetch_weights(REPOSITORIES[model]))
        except Unreachable:
            print(where_to_get_them, file=sys.stderr)
            raise
    if is_repository(weights):
        return str(fetch_weights(weights))
    if weights.lower().endswith(formats.ENDINGS):
        raise UserError(f"--weights {weights}: there is no such file")
    print(where_to_get_them, file=sys.stderr)
    raise UserError(
        f"there are no weights in {weights}; see above where to get them and what to type"
    )


def fetched(given: dict) -> dict:
    """{setting: local path} of weights and data that are named as repositories, once fetched.

    Raises UserError and Unreachable as `fetch_weights` does.
    """
    paths = {}
    for name, fetch in (("weights", fetch_weights), ("data", fetch_data)):
        if is_repository(given.get(name) or ""):
            paths[name] = str(fetch(given[name]))
    return paths


def default_out(given: dict) -> str:
    """The run's folder without --out: named after the size, or else after the weights."""
    if "weights" in given and "model" not in given:
        name = given["weights"]
        if is_repository(name):
            name = name.partition(":")[2] or name
        weights = pathlib.Path(name).resolve()
        return f"runs/{weights.stem if weights.suffix in formats.ENDINGS else weights.name}"
    return f"runs/{given.get('model', 'tiny')}"


def resumed(given: dict, parser: Parser) -> dict:
    """The settings in run.json; only those in CHANGEABLE may be given another value.

    The learning rate is constant, so more steps are more of the same. Files may have moved:
    weights, tokenizer and examples are recognised by their contents.
    """
    path = pathlib.Path(given.get("out") or default_out(given)) / "run.json"
    if not path.exists():
        raise UserError(
            f"nothing to resume: there is no {path}; start without --resume, or name the run "
            "with --out"
        )
    try:
        values = read_json(path)
        values.setdefault("template")  # it is newer than the first runs
        if values.pop("adapt", "offsets") != "offsets":  # once, scales could learn
            raise ValueError("scales no longer learn")
        for field in dataclasses.fields(Settings):
            may_be_null = type(None) in typing.get_args(field.type)
            kept = field.name in values and (may_be_null or values[field.name] is not None)
            if not (kept or field.name in THIS_START):
                raise ValueError(f"it lacks {field.name}")
        if values["model"] not in (None, *CONFIGS):
            raise ValueError(f"there is no model {values['model']!r}")
        words = [f"{option(name)}={v}" for name, v in values.items() if v is not None]
        values |= typed(parser.parse_args(words))
        for name in THIS_START:
            values.pop(name)
    except (ValueError, UserError) as e:
        raise UserError(
            f"{path} is damaged ({e}); correct it, or remove {path.parent}/step-* and start "
            "without --resume"
        ) from e
    for name, value in given.items():
        if name not in CHANGEABLE and values.get(name) != value:
            raise UserError(
                f"{option(name)} {value} contradicts {path}, which says {values.get(name)}; leave "
                f"it out, or remove {path.parent}/step-* and start without --resume"
            )
    values |= {**given, "out": str(path.parent)}
    check_alone(values, given)
    return {**values, **fetched(given)}


# ---- run.json


def as_text(settings: Settings) -> str:
    """What run.json holds of the settings."""
    values = dataclasses.asdict(settings)
    kept = {name: value for name, value in values.items() if name not in THIS_START}
    return json.dumps(kept, indent=2) + "\n"


def save_settings(settings: Settings) -> None:
    """Writes run.json, from which --resume reads what the command line does not say."""
    with written_whole(pathlib.Path(settings.out) / "run.json") as beside:
        beside.write_text(as_text(settings))


# ---- checks


def config_of(weights: str | None) -> LlamaConfig:
    """The dimensions of the model that is fine-tuned; without weights it is the tiny one."""
    return formats.read_config(weights) if weights else CONFIGS["tiny"]


def check(settings: Settings) -> None:
    """Raises UserError for settings that cannot work."""
    config = config_of(settings.weights)
    check_size(settings, config)
    kept = formats.quantization_of(settings.weights) if settings.weights else None
    if kept:
        check_quantized_weights(settings, kept)
    elif settings.method == "qalora":
        check_group_size(config, settings.group_size)
    check_tokenizer(settings, config)
    check_writable(pathlib.Path(settings.out))


def check_alone(values: dict, given: dict) -> None:
    """Raises UserError for what is wrong whatever the weights are; before anything is fetched."""
    for name in ("bits", "group_size", "quantizer"):
        if name in given and values["method"] != "qalora":
            raise UserError(
                f"{option(name)} has no effect with --method {values['method']}; leave it out"
            )
    if values["rank"] == "full" and values["method"] != "qalora":
        raise UserError("--rank full is for --method qalora; give a number")
    if values["rank"] == "full" and "alpha" in given:
        raise UserError("--alpha has no effect with --rank full; leave it out")
    check_targets(values["targets"].split(","))
    if values["tokenizer"]:
        formats.load_tokenizer(values["tokenizer"])
    for name in ("data", "calibration"):
        file = values[name]
        can_be_fetched = name == "data" and is_repository(given.get(name, ""))
        if file and not can_be_fetched and not pathlib.Path(file).is_file():
            raise UserError(f"{option(name)} {file}: there is no such file")
    template = values["template"]
    if template not in (None, "alpaca"):
        if not pathlib.Path(template).is_file():
            raise UserError(f"--template {template}: it is neither alpaca nor a file")
        check_template(read_text(template))
    if not 0 <= values["seed"] < 2**63:
        raise UserError(f"--seed {values['seed']} is not between 0 and 2**63")
    if values["batch_size"] % machine.WORLD:
        raise UserError(
            f"--batch-size {values['batch_size']} cannot be shared by {machine.WORLD} processes; "
            "use a multiple"
        )
    take_device(values["device"])


def check_size(settings: Settings, config: LlamaConfig) -> None:
    """Raises UserError when the weights are not of the size --model, or their context too short."""
    for name in SIZES:
        expected, found = getattr(CONFIGS.get(settings.model, config), name), getattr(config, name)
        if found != expected:
            raise UserError(
                f"--model {settings.model} has {name} {expected}, but {settings.weights} has "
                f"{found}; leave out --model, or name the right --weights"
            )
    if settings.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length {settings.max_length} is more than the model's context of "
            f"{config.max_position_embeddings} tokens; lower it"
        )


def check_quantized_weights(settings: Settings, kept: dict) -> None:
    """Raises UserError when weights that are quantized already contradict the settings."""
    if kept.get("quantizer") == "nf4":
        raise UserError(
            f"{settings.weights} is quantized to NF4, whose values have no offset to train; "
            "name the float model"
        )
    bits, group_size = kept.get("bits"), kept.get("group_size")
    if (settings.method, settings.bits, settings.group_size) != ("qalora", bits, group_size):
        raise UserError(
            f"{settings.weights} is quantized already, to {bits} bits in groups of {group_size}: "
            "leave out --method, --bits and --group-size"
        )
    frozen = [name.rpartition(".")[2] for name, kind in kept.get("layers", {}).items() if not kind]
    layers = config_of(settings.weights).num_hidden_layers
    if all(frozen.count(target) == layers for target in settings.targets.split(",")):
        raise UserError(
            f"--targets {settings.targets}: none of them is quantized in groups in "
            f"{settings.weights}; name others, or leave it out"
        )


def take_device(device: str) -> None:
    """Gives this process a GPU of its own; raises UserError where the device cannot be used."""
    if device == "cuda" and torch.cuda.is_available():
        gpu = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
        if gpu >= torch.cuda.device_count():
            raise UserError(
                f"process {gpu} has no GPU: there are {torch.cuda.device_count()}; "
                "lower --nproc_per_node"
            )
        torch.cuda.set_device(gpu)  # before anything is computed on "cuda"
    check_device(device)


def check_tokenizer(settings: Settings, config: LlamaConfig) -> None:
    """Raises UserError when the tokenizer is missing or does not belong to the weights."""
    if not (settings.weights or settings.tokenizer):
        return  # the tiny model's is still to be made
    tokenizer = formats.load_tokenizer(settings.tokenizer or settings.weights)
    tokenizer.check_fits(config.vocab_size, settings.weights or "the tiny model")
    if settings.weights and settings.tokenizer:
        formats.check_tokenizer(settings.weights, tokenizer)


def check_writable(out: pathlib.Path) -> None:
    """Makes the run's folder; raises UserError when it cannot be written."""
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been faster
    except OSError as e:
        raise UserError(
            f"--out {out} cannot be written ({e.strerror}); choose another folder"
        ) from e
