"""The options of train.py: what they mean, what they default to, and every check that needs no slow work."""

import os
import pathlib
import shutil
import sys

import torch

import data
from cli import Parser, UserError
from export import check_gguf, is_gguf
from llama import CONFIGS, LINEARS, Llama, check_device, open_weights, read_config, read_json, weight_files
from qalora import check_targets
from quant import check_group_size, load_quantized, quantization_of

TOY = dict(rank=8, alpha=16.0, lr=1.5e-3, steps=400, batch_size=32, micro_batch_size=32, max_length=256, clip=1.0)
REAL = dict(rank=64, alpha=16.0, lr=2e-5, steps=10_000, batch_size=16, micro_batch_size=4, max_length=512, clip=0.3)
CHANGEABLE = ("out", "steps", "device", "micro_batch_size", "checkpointing", "save_every", "weights", "tokenizer", "data",
              "calibration")  # on resuming: none changes what a step learns, but for rounding
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MISSING_WEIGHTS = """\
LLaMA weights are to be had from Meta (llama.com) or, once its licence is accepted, from huggingface.co/meta-llama.
Put config.json, tokenizer.model and the .safetensors files (or Meta's own files) into one folder, then type:
    python train.py --model {model} --weights FOLDER --data alpaca.json --out runs/{model}"""


def read_settings(description):
    """A dict of all settings: what the command line says, else run.json (with --resume), else the recipe.

    Raises UserError for anything wrong that can be seen before the first slow stage.
    """
    parser = Parser(prog="train.py", description=description)
    say = parser.add_argument
    say("--model", help=f"tiny (the default without --weights), or the size that --weights must have: {' '.join(CONFIGS)}")
    say("--weights", help="a LLaMA: a folder of Hugging Face, of Meta or of merge.py, or a Q4_1 .gguf (weights/MODEL)")
    say("--tokenizer", help="its sentencepiece model, where the weights' folder has none")
    say("--data", help="instructions: JSON or JSONL in Alpaca's form or another (see data.py), or plain text")
    say("--calibration", help="text or instructions for GPTQ (default: the training data)")
    say("--calibration-tokens", type=positive(int), help="how many tokens of it at most (262144: 128 times 2048)")
    say("--out", help="the folder of the run (runs/MODEL)")
    say("--method", choices=["qalora", "lora", "qlora"], help="qalora, or one of the baselines")
    say("--bits", type=int, choices=[2, 3, 4], help="bits of a code (4)")
    say("--group-size", type=positive(int), help="inputs that share a scale and an offset (32)")
    say("--quantizer", choices=["gptq", "rtn"], help="gptq, or rounding to nearest")
    say("--rank", type=positive(int), help="rank of the adapters (64; tiny: 8)")
    say("--alpha", type=positive(float), help="the adapters are scaled by alpha / rank (16)")
    say("--targets", help="the layers that get one, such as q_proj,v_proj (all seven)")
    say("--lr", type=positive(float), help="learning rate, constant (2e-5, above 13b 1e-5; tiny: 1.5e-3)")
    say("--clip", type=positive(float), help="a longer gradient is cut to this norm (0.3; tiny: 1)")
    say("--steps", type=positive(int), help="steps of fine-tuning (10000; tiny: 400)")
    say("--batch-size", type=positive(int), help="records in a step, over all processes (16; tiny: 32)")
    say("--micro-batch-size", type=positive(int), help="records at once on one device (4; tiny: 32)")
    say("--max-length", type=positive(int), help="a longer record is cut to so many tokens (512; tiny: 256)")
    say("--checkpointing", type=int, choices=[0, 1], help="1: recompute each block in the backward pass, to save memory")
    say("--paged-optimizer", type=int, choices=[0, 1], help="1: AdamW's state pages out to host memory (CUDA only)")
    say("--save-every", type=positive(int), help="steps between checkpoints (100)")
    say("--seed", type=int, help="decides the adapters' start and the order of the data (0)")
    say("--device", help="cpu or cuda (cuda where there is one)")
    say("--resume", action="store_true", help="go on with the run in --out")
    say("--fresh", action="store_true", help="also make anew what is otherwise kept: the tiny model and the quantized base")
    say("--plot", action="store_true", help="draw the loss curve to loss.png in the run's folder (needs matplotlib)")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    for name, value in given.items():
        if value == "":  # such as an unset variable of the shell
            raise UserError(f"--{name.replace('_', '-')} is empty; give it a value or leave it out")
    now = {name: given.pop(name) for name in ("resume", "fresh", "plot")}  # what this start is to do, not the run
    if now["resume"] and now["fresh"]:
        raise UserError("--resume goes on with what --fresh would make anew; leave out one of them")
    if now["plot"]:
        check_matplotlib()
    settings = resumed(given, parser) if now["resume"] else {**recipe(given), **given}
    check(settings)
    for name in ("bits", "group_size", "quantizer"):
        if name in given and settings["method"] != "qalora":
            raise UserError(f"--{name.replace('_', '-')} means nothing to --method {settings['method']}; leave it out")
    if settings["paged_optimizer"] and not settings["device"].startswith("cuda"):
        print(f"--paged-optimizer: on --device {settings['device']} there is nothing to page; plain AdamW is used")
        settings["paged_optimizer"] = 0
    return {**settings, **now}


def check_matplotlib():
    try:
        import matplotlib  # noqa: F401  at the end of a long run would be too late
    except ImportError as e:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from e


def positive(kind):
    """A converter for numbers above zero, for argparse."""
    def read(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value
    read.__name__ = f"{kind.__name__} above zero"  # argparse says: invalid int above zero value: '0'
    return read


def config_of(weights, tokenizer):
    """The LlamaConfig of --weights: a folder, or a GGUF file, which comes without a sentencepiece model."""
    if not is_gguf(weights):
        return read_config(weights)
    if tokenizer is None:
        raise UserError(f"{weights} needs --tokenizer FILE, the sentencepiece model that belongs to it")
    return check_gguf(pathlib.Path(weights), data.load_tokenizer(tokenizer))


def quantized_already(weights):
    """{"bits", "group_size", ...} of --weights that are quantized, else None."""
    return {"bits": 4, "group_size": 32} if is_gguf(weights) else quantization_of(weights)


def recipe(given):
    """The defaults: for real weights those of the paper (section 4.1), with its lower learning rate above 13b."""
    model = given.get("model") or (None if "weights" in given else "tiny")
    if model not in (None, *CONFIGS):
        raise UserError(f"unknown --model {model}; choose one of {', '.join(CONFIGS)}")
    weights = given.get("weights") or (None if model == "tiny" else f"weights/{model}")
    if weights and not pathlib.Path(weights).exists():
        if is_gguf(weights):
            raise UserError(f"--weights {weights}: there is no such file")
        print(MISSING_WEIGHTS.format(model=model or "7b"), file=sys.stderr)
        raise UserError(f"there are no weights in {weights}; see above where to get them and what to type")
    settings = dict(TOY if not weights else REAL, bits=4, group_size=32, quantizer="gptq", method="qalora")
    if weights:
        kept = quantized_already(weights) or {}
        settings |= {name: kept[name] for name in ("bits", "group_size") if name in kept}
        config = config_of(weights, given.get("tokenizer"))
        settings["lr"] = 1e-5 if config.hidden_size > 5120 else settings["lr"]
        settings["max_length"] = min(settings["max_length"], config.max_position_embeddings)
    return dict(model=model, weights=weights, tokenizer=None, data=None, calibration=None, calibration_tokens=2 ** 18,
                out=default_out(given), targets=",".join(LINEARS),
                checkpointing=int(bool(weights)), save_every=100, seed=0,
                paged_optimizer=0,
                device="cuda" if torch.cuda.is_available() else "cpu", **settings)


def default_out(given):
    """The run's folder where --out does not say it: named after the size, or else after the weights."""
    if "weights" in given and "model" not in given:
        return f"runs/{pathlib.Path(given['weights']).resolve().name.removesuffix('.gguf')}"
    return f"runs/{given.get('model', 'tiny')}"


def resumed(given, parser):
    """The settings in run.json; only those in `CHANGEABLE` may differ.

    The learning rate is constant, so more steps are more of the same. Files may have moved: train.py recognises the
    weights, the tokenizer and the examples by their contents.
    """
    path = pathlib.Path(given.get("out") or default_out(given)) / "run.json"
    if not path.exists():
        raise UserError(f"nothing to resume: there is no {path}; start without --resume, or name the run with --out")
    try:
        settings = read_json(path)
        needed = {name for name, value in recipe({"model": "tiny"}).items() if value is not None and name != "model"}
        if any(settings.get(name) is None for name in needed):
            raise ValueError("it lacks settings")
        words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
        settings |= {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    except (ValueError, UserError) as e:
        raise UserError(f"{path} is damaged ({e}); remove {path.parent}/step-* and start without --resume") from e
    for name, value in given.items():
        if name not in CHANGEABLE and settings.get(name) != value:
            raise UserError(f"--{name.replace('_', '-')} {value} contradicts {path}, which says {settings.get(name)}; "
                            f"leave it out, or remove {path.parent}/step-* and start without --resume")
    return {**settings, **given, "out": str(path.parent)}


def check(s):
    """Raises UserError for settings that cannot work."""
    config = config_of(s["weights"], s["tokenizer"]) if s["weights"] else CONFIGS["tiny"]
    for name in SIZES:
        expected = getattr(CONFIGS.get(s["model"], config), name)
        if getattr(config, name) != expected:
            raise UserError(f"--model {s['model']} has {name} {expected}, but {s['weights']} has {getattr(config, name)}; "
                            "leave out --model, or name the right --weights")
    if s["max_length"] > config.max_position_embeddings:
        raise UserError(f"--max-length {s['max_length']} is more than the model's context of "
                        f"{config.max_position_embeddings} tokens; lower it")
    if s["method"] == "qalora":
        check_group_size(config, s["group_size"])
    kept = quantized_already(s["weights"]) if s["weights"] else None
    if kept and kept.get("quantizer") == "nf4":
        raise UserError(f"{s['weights']} is quantized to NF4, whose values have no offset to train; name the float model")
    if kept and (s["method"], s["bits"], s["group_size"]) != ("qalora", kept.get("bits"), kept.get("group_size")):
        raise UserError(f"{s['weights']} is quantized already, to {kept.get('bits')} bits in groups of "
                        f"{kept.get('group_size')}: leave out --method, --bits and --group-size")
    check_targets(s["targets"].split(","))
    if s["weights"] and not s["data"]:
        raise UserError("--data FILE is missing: the instructions to fine-tune on, for example alpaca.json")
    for option in ("data", "calibration"):
        if s[option] and not pathlib.Path(s[option]).is_file():
            raise UserError(f"--{option} {s[option]}: there is no such file")
    if not 0 <= s["seed"] < 2 ** 63:
        raise UserError(f"--seed {s['seed']} is not between 0 and 2**63")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if s["batch_size"] % processes:
        raise UserError(f"--batch-size {s['batch_size']} cannot be shared by {processes} processes; use a multiple")
    if s["device"] == "cuda" and torch.cuda.is_available():
        gpu = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
        if gpu >= torch.cuda.device_count():
            raise UserError(f"process {gpu} has no GPU: there are {torch.cuda.device_count()}; lower --nproc_per_node")
        torch.cuda.set_device(gpu)  # which "cuda" means from here on, before anything is computed there
    check_device(s["device"])
    if s["weights"] or s["tokenizer"]:
        spelling = s["tokenizer"] or s["weights"]
        pieces = data.load_tokenizer(spelling).vocab_size()
        if pieces > config.vocab_size:
            raise UserError(f"the tokenizer of {spelling} has {pieces} pieces, but {s['weights'] or 'the tiny model'} has "
                            f"an embedding (model.embed_tokens.weight) for {config.vocab_size}: they do not belong "
                            "together; name the right one with --tokenizer")
    out = pathlib.Path(s["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink(missing_ok=True)  # another process may have been faster
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror}); choose another folder") from e


def check_weights(weights):
    """Raises UserError where --weights lack a tensor or have one of another shape; config_of has checked a GGUF file."""
    if not is_gguf(weights):
        (load_quantized if quantization_of(weights) else open_weights)(weights)


def checkpoints(out):
    """The folders step-N/, in the order of N. Others, such as a copy named step-4.bak, are the user's own."""
    return sorted((f for f in out.glob("step-*") if f.name[5:].isdecimal()), key=lambda folder: int(folder.name[5:]))


def check_room(s, base_is_made):
    """Raises UserError when the disk cannot hold what the run will write: base (unless made), checkpoints, result.

    Old checkpoints count as room, as new ones replace them; but an old base is there until a new one is.
    """
    out = pathlib.Path(s["out"])
    with torch.device("meta"):
        model = Llama(config_of(s["weights"], s["tokenizer"]) if s["weights"] else CONFIGS["tiny"])
    linears = sum(p.numel() for p in model.model.layers.parameters())
    others = sum(p.numel() for p in model.parameters()) - linears
    per_weight = {"qalora": s["bits"] / 8 + 6 / s["group_size"], "qlora": 4.127 / 8, "lora": 4}[s["method"]]
    base = linears * per_weight + 4 * others
    if s["weights"] and is_gguf(s["weights"]):
        base += 4 * others  # the file's own are kept too
    elif s["weights"] and (s["method"] == "lora" or quantization_of(s["weights"])):  # a copy
        base = sum(f.stat().st_size for f in weight_files(pathlib.Path(s["weights"])))
    pooled = s["group_size"] if s["method"] == "qalora" else 1
    widths = sum(p.shape[0] + p.shape[1] // pooled for name, p in model.named_parameters()
                 if name.split(".")[-2] in s["targets"].split(","))
    rest = 2 * 3 * 4 * s["rank"] * widths  # twice an adapter and AdamW's two moments
    replaced = sum(f.stat().st_size for folder in (*checkpoints(out), out / "previous-adapter") for f in folder.glob("*"))
    need, free = (0 if base_is_made else base) + max(0, rest - replaced), shutil.disk_usage(out).free
    if need > free:
        raise UserError(f"--out {out} has {free / 1e9:.3f} GB free where the run may need {need / 1e9:.3f} GB; "
                        "choose a disk with more room")
