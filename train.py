"""QA-LoRA from end to end: quantize a LLaMA, train adapters beside it, fold them in, score every stage.

    python train.py                                      a tiny LLaMA in a toy world, in minutes
    python train.py --model 7b --weights DIR --data alpaca.json --out runs/7b
    python train.py --resume --out runs/7b               goes on after an interruption
    torchrun --nproc_per_node=2 train.py --model 7b ...  on several GPUs (or processes)

A run is a folder: run.json (every setting), base/ (the quantized model), step-N/ (a checkpoint), adapter/ (the result),
metrics.jsonl (a line a step), results.json. A step's batch is a function of the settings and the step alone, and
nothing else is drawn at random: so a resumed run goes on to the same bits, and processes only share the work.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from shlex import quote

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import data
import evals
from cli import UserError, run_command, written_whole
from export import import_gguf, is_gguf
from llama import CONFIGS, Llama, compute_dtype, fill, linears, open_weights, read_json, save_pretrained
from merge import fingerprint, load_model, merge, save_merged
from nf4 import quantize_model_nf4
from qalora import adapter_parameters, add_adapters, restore_adapter, save_adapter
from quant import quantization_of, quantize_model, save_quantized
from settings import check_room, check_weights, checkpoints, quantized_already, read_settings

TOY_BASE = pathlib.Path("runs/tiny-base")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


# ---- 1. the tiny model

def pretrain(world, folder, config=CONFIGS["tiny"], steps=1900, lr=5e-3, seed=0, batch_size=16, length=64, warmup=1):
    """Trains a small LLaMA and its tokenizer on the toy world's documents, in float32; writes a model folder."""
    torch.manual_seed(seed)
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    passes = [world.documents(rng) for _ in range(50)]
    with written_whole(folder) as beside:
        beside.mkdir()
        spelled = sum(passes[:4], [r.prompt for r in world.train])  # more passes would crowd out the prompts' words
        tokenizer = data.train_tokenizer(spelled, beside / "tokenizer.model", config.vocab_size)
        tokens = data.token_stream(sum(passes, []), tokenizer)
        model = Llama(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        rate = lambda step: min(1, (step + 1) / warmup, 2 * (1 - step / steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for _ in (bar := tqdm(range(steps), "pretraining", unit="step")):
            batch = data.windows(tokens, batch_size, length + 1, draw)
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        save_pretrained(model, beside)


# ---- 2. the base

def made_from(s):
    """The text of made_from.json for a base with these settings."""
    weights = pathlib.Path(s["weights"] or TOY_BASE)
    spelling = data.load_tokenizer(s["tokenizer"] or weights).serialized_model_proto()
    wanted = {"method": s["method"], "source": fingerprint(weights)}
    wanted |= {"tokenizer": hashlib.sha256(spelling).hexdigest()}
    if s["method"] == "qalora":
        wanted |= {"bits": s["bits"], "group_size": s["group_size"], "quantizer": s["quantizer"]}
    if uses_gptq(s):
        told = hashlib.sha256(pathlib.Path(s["calibration"]).read_bytes()).hexdigest() if s["calibration"] else None
        wanted |= {"calibration": told, "calibration_tokens": s["calibration_tokens"]}  # None: any data serves
    return json.dumps(wanted, indent=2) + "\n"


def base_is_made(s):
    """Whether the run's base/ is there and was made from the same weights in the same way.

    Raises UserError when a run that is to be resumed was trained over another base.
    """
    base, weights = pathlib.Path(s["out"]) / "base", s["weights"] or TOY_BASE
    record = base / "made_from.json"
    if s["fresh"] or not record.exists():
        return False
    if record.read_bytes() == made_from(s).encode():
        print(f"base: {base} is already made from these weights in this way")
        return True
    if s["resume"] and newest_checkpoint(pathlib.Path(s["out"])):
        raise UserError(f"{weights}, its tokenizer, the calibration or run.json has changed since {base} was made, so the run "
                        f"cannot go on; put the old files back, or remove {s['out']}/step-* and start without --resume")
    print(f"base: {base} was made from other weights or in another way; making it anew")
    return False


def uses_gptq(s):
    """Whether making the base calls for calibration."""
    kept = s["weights"] and quantized_already(s["weights"])
    return s["method"] == "qalora" and s["quantizer"] == "gptq" and not kept


def prepare_base(s, texts):
    """Makes the run's base/, by GPTQ on `texts` where that is wanted."""
    base, weights = pathlib.Path(s["out"]) / "base", pathlib.Path(s["weights"] or TOY_BASE)
    tokenizer, record = data.load_tokenizer(s["tokenizer"] or weights), made_from(s)  # of the weights as they are now
    with written_whole(base) as beside:
        beside.mkdir()
        (beside / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
        windows = lambda config: calibration_windows(texts, tokenizer, config, s["calibration_tokens"])
        make_base(s, weights, beside, windows)
        (beside / "made_from.json").write_text(record)


def make_base(s, weights, folder, calibration):
    """Writes the model beside which adapters are trained: float for lora, NF4 for qlora, quantized in groups for qalora."""
    if is_gguf(weights):
        import_gguf(weights, folder)
        return
    if quantization_of(weights):  # a merged model fine-tuned again
        for name in ("model.safetensors", "config.json", "gguf.safetensors"):  # the last where it came from a GGUF file
            if (weights / name).exists():
                shutil.copyfile(weights / name, folder / name)
        return
    config, tensors = open_weights(weights)
    with torch.device("meta"):
        model = Llama(config)
    stored = tensors["model.embed_tokens.weight"]().dtype
    dtype = compute_dtype(stored, s["device"])
    if s["method"] == "lora":
        save_pretrained(fill(model, tensors), folder)
        return
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        if f"{name}.weight" in tensors:
            fill(model.get_submodule(name), tensors, f"{name}.", dtype, s["device"])
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if s["method"] == "qlora":
        quantize_model_nf4(model, tensors)
        save_quantized(model, folder, stored, quantizer="nf4")
        return
    quantize_model(model, s["bits"], s["group_size"], calibration(config) if s["quantizer"] == "gptq" else None, tensors)
    save_quantized(model, folder, stored, quantizer=s["quantizer"])


def calibration_windows(texts, tokenizer, config, count):
    """About `count` tokens of the texts, in windows [N, T] of at most 2,048 tokens."""
    tokens = data.token_stream(texts, tokenizer)[:count]
    length = min(len(tokens), 2048, config.max_position_embeddings)
    return tokens[:len(tokens) // length * length].view(-1, length)


# ---- 3. fine-tuning

def fine_tune(s, model, examples, held_out):
    """Trains the adapters of `model` in place, from the newest checkpoint with --resume, else from the start.

    Raises UserError when the loss is not finite.
    """
    out, parameters = pathlib.Path(s["out"]), list(adapter_parameters(model).values())
    optimizer = adamw(parameters, s)
    done = load_checkpoint(s, model, optimizer) if s["resume"] else 0
    network, lengths = model, tuple(len(e.tokens) for e in examples)
    if dist.is_initialized():  # the base is the same file for all, and the adapters start from the same seed: nothing to send
        network = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, init_sync=False)
    bar = tqdm(range(done, s["steps"]), "fine-tuning", unit="step", initial=done, total=s["steps"], disable=RANK > 0)
    with stopped_by_signals() as signals, metrics_from(out, done) as write_metrics:
        for step in bar:
            start = time.monotonic()
            batch = [examples[i] for i in data.batch_order(lengths, s["batch_size"], step, s["seed"])]
            loss = accumulate_gradients(network, batch, s["micro_batch_size"])
            norm = torch.nn.utils.clip_grad_norm_(parameters, s["clip"]).item()
            check_finite(out, step + 1, loss=loss, gradient=norm)
            optimizer.step()
            optimizer.zero_grad()
            speed = sum(len(e.tokens) for e in batch) / (time.monotonic() - start)
            line = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": s["lr"], "tokens_per_second": round(speed, 1)}
            last, stop = step + 1 == s["steps"], in_any_process(signals, s["device"])
            save = (step + 1) % s["save_every"] == 0 or last or stop
            if save and held_out and not stop:
                line["validation_loss"] = evals.response_loss(model, held_out, s["micro_batch_size"])
                check_finite(out, step + 1, validation_loss=line["validation_loss"])
            write_metrics(line)  # before the checkpoint: resuming cuts lines off, but could not add one
            if save:
                save_checkpoint(s, step + 1, model, optimizer)
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}", GB=f"{memory_in_use(s['device']):.1f}", refresh=False)
            if stop and not last:
                bar.close()
                how = f"stopped after step {step + 1}; go on with: python train.py --resume --out {quote(str(out))}"
                sys.exit(how if RANK == 0 else 1)
    if signals and WORLD == 1:  # it came with the last step
        raise KeyboardInterrupt


def check_finite(out, step, **values):
    """Raises UserError, naming the last good checkpoint, when one of a step's values is not a finite number."""
    for name, value in values.items():
        if not math.isfinite(value):
            good = newest_checkpoint(out)
            raise UserError(f"step {step}: the {name.replace('_', ' ')} is {value:g}; "
                            + (f"the last good checkpoint is {good}; remove it to start anew with a lower --lr" if good
                               else "there is no good checkpoint; start anew with a lower --lr"))


def in_any_process(signals, device):
    """Whether any process has received a signal: it reaches each at another moment, but they must stop together."""
    if not dist.is_initialized():
        return bool(signals)
    received = torch.tensor(len(signals), device=device)
    dist.all_reduce(received)
    return received.item() > 0


def adamw(parameters, s):
    """AdamW; with --paged-optimizer its two moments live in memory that the GPU pages out when it is short."""
    if not s["paged_optimizer"]:
        return torch.optim.AdamW(parameters, lr=s["lr"], weight_decay=0.0)
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError as e:
        raise UserError("--paged-optimizer needs bitsandbytes: pip install bitsandbytes") from e
    return PagedAdamW32bit(parameters, lr=s["lr"], weight_decay=0.0)


def page_again(optimizer):
    """Puts the moments of a paged AdamW back where they can be paged: it loads a state to the GPU's own memory."""
    for parameter, moments in optimizer.state.items():
        for name in ("state1", "state2"):
            moments[name] = optimizer.get_state_buffer(parameter).copy_(moments[name])


def accumulate_gradients(network, batch, micro_batch_size):
    """Adds to the gradients those of a batch's loss; returns the loss, a mean over the batch's response tokens.

    Every micro-batch's sum is divided by the number of response tokens in the *global* batch, so neither accumulation
    nor the number of processes changes the loss. Of the batch, this process takes every WORLD-th example.
    """
    response_tokens = sum(len(e.tokens) - e.prompt_length for e in batch)
    mine = batch[RANK::WORLD]
    micro_batches = [mine[i:i + micro_batch_size] for i in range(0, len(mine), micro_batch_size)]
    device, total = next(network.parameters()).device, 0.0
    for micro_batch in micro_batches:
        tokens_BT, target_BT = (t.to(device) for t in data.collate(micro_batch))
        waits = dist.is_initialized() and micro_batch is not micro_batches[-1]  # the gradients meet once a step
        with network.no_sync() if waits else contextlib.nullcontext():
            logits_NV = network(tokens_BT[:, :-1], keep_BT=target_BT[:, 1:])
            loss = F.cross_entropy(logits_NV.float(), tokens_BT[target_BT], reduction="sum") / response_tokens
            (loss * WORLD).backward()  # DistributedDataParallel takes the mean over the processes
        total += loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def memory_in_use(device):
    """GB that the process has taken: on the GPU its peak, on the CPU what is resident now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    statm = pathlib.Path("/proc/self/statm")  # Linux only; elsewhere the bar shows 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9 if statm.exists() else 0.0


@contextlib.contextmanager
def stopped_by_signals():
    """Yields a list that the first Ctrl-C or SIGTERM is put into, so that the step can end; a second one ends it at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)

    before = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@contextlib.contextmanager
def metrics_from(out, done):
    """Yields a function that appends one line to metrics.jsonl, after cutting it back to the first `done` steps."""
    path = out / "metrics.jsonl"
    if RANK:
        yield lambda line: None
        return
    lines = path.read_bytes().splitlines(keepends=True)[:done] if path.exists() else []
    with written_whole(path) as beside:
        beside.write_bytes(b"".join(lines))
    with open(path, "a", buffering=1) as file:  # by lines, so that what has happened can be read at any time
        yield lambda line: file.write(json.dumps(line) + "\n")


# ---- checkpoints: step-N/ is complete when it bears that name

LASTING = ("method", "bits", "group_size", "rank", "alpha", "targets", "lr", "clip", "batch_size", "max_length", "seed",
           "base", "examples")  # besides settings, the identities of what was trained beside and on


def save_checkpoint(s, step, model, optimizer):
    """Writes step-N/ (adapter, AdamW's state, what must not change), then removes older ones. Only process 0 writes.

    Raises UserError when it cannot be written; the older ones stay.
    """
    if RANK > 0:
        return
    out, lasting = pathlib.Path(s["out"]), {name: s[name] for name in LASTING if name in s}
    try:
        with written_whole(out / f"step-{step}") as beside:
            save_adapter(model, beside)  # makes the folder
            torch.save({"step": step, "optimizer": optimizer.state_dict()}, beside / "optimizer.pt")
            (beside / "settings.json").write_text(json.dumps(lasting, indent=2) + "\n")
    except (OSError, RuntimeError, SafetensorError) as e:  # each has its own way of saying that a disk is full
        raise UserError(f"{out}/step-{step} could not be written ({e}); if the disk is full, free some space, then go on "
                        f"with: python train.py --resume --out {quote(str(out))}") from e
    for folder in checkpoints(out):
        if folder.name != f"step-{step}":
            shutil.rmtree(folder)


def newest_checkpoint(out):
    """The step-N/ with the highest N, or None."""
    return next(reversed(checkpoints(out)), None)


def load_checkpoint(s, model, optimizer):
    """Restores the newest checkpoint into the adapters and the optimizer; returns its step, 0 when there is none.

    Raises UserError when it is damaged.
    """
    folder = newest_checkpoint(pathlib.Path(s["out"]))
    if folder is None:
        return 0
    restore_adapter(model, folder)
    try:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    except Exception as e:  # a broken file can raise anything: the parser is not ours
        raise UserError(f"{folder}/optimizer.pt is missing or damaged ({type(e).__name__}); remove {folder} and start "
                        "without --resume") from e
    if s["paged_optimizer"]:
        page_again(optimizer)
    return step


def check_same_run(s):
    """Raises UserError when settings, base or data are no longer those of the newest checkpoint."""
    folder = newest_checkpoint(pathlib.Path(s["out"]))
    if folder is None:
        return
    lasting = read_json(folder / "settings.json")
    for name in LASTING:
        if name not in lasting:
            raise UserError(f"{folder}/settings.json lacks {name}; remove {folder} and start without --resume")
        if lasting[name] != s[name]:
            where = {"base": f"{s['out']}/base", "examples": f"--data {s['data']}"}.get(name, f"{s['out']}/run.json")
            raise UserError(f"{folder} was trained with {name} {lasting[name]}, now it is {s[name]}: {where} has changed; "
                            f"put it back, or remove {folder} and start without --resume")


# ---- 4. merging, and 5. scoring

def logits_digest(model, examples, batch_size):
    """SHA-256 over the bits of all logits of the examples: equal digests mean equal logits."""
    sha = hashlib.sha256()
    with torch.inference_mode():
        for i in range(0, len(examples), batch_size):
            tokens_BT, _ = data.collate(examples[i:i + batch_size])
            logits = model(tokens_BT.to(next(model.parameters()).device))
            sha.update(logits.cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def bits_per_weight(model):
    """Bits that the blocks' linear layers and their adapters take, measured from what they hold, per weight."""
    layers = [layer for _, layer in linears(model)]
    weights = sum(base.in_features * base.out_features for base in (getattr(m, "base", m) for m in layers))
    return 8 * sum(t.nbytes for m in layers for t in m.state_dict().values()) / weights


def score(label, model, tokenizer, world, files):
    """One row of the default run's table."""
    stream = data.token_stream(world.heldout, tokenizer)
    choices = evals.multiple_choice(model, tokenizer, world.choices, 256, f"{label}: multiple choice")
    return {"model": label,
            "exact_match": evals.exact_match(model, tokenizer, world.test, 8, 64, f"{label}: exact match"),
            "multiple_choice": choices["accuracy"],
            "perplexity": evals.perplexity(model, stream, 64, f"{label}: perplexity", 64),
            "bits_per_weight": bits_per_weight(model),
            "megabytes": sum(f.stat().st_size for folder in files for f in folder.glob("*.safetensors")) / 1e6}


def table(rows):
    """The rows as text."""
    head = f"{'':16}exact match  multiple choice  perplexity  bits per weight  file size"
    return "\n".join([head] + [
        f"{r['model']:16}{r['exact_match']:10.1%}{r['multiple_choice']:17.1%}{r['perplexity']:12.3f}"
        f"{r['bits_per_weight']:17.3f}{r['megabytes']:8.2f} MB" for r in rows])


# ---- the whole run

def main():
    s = read_settings(__doc__)
    if WORLD == 1:  # as Ctrl-C; a process that waits for others would never hear it
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with kept_from_other_runs(s["out"]):
        try:
            whole_run(s)
        except KeyboardInterrupt:
            told = pathlib.Path(s["out"]) / "run.json"
            if RANK or not told.exists() or told.read_text() != settings_text(s):  # it is that of an earlier run
                raise
            sys.exit(f"stopped; go on with: python train.py --resume --out {quote(s['out'])}")
        except RuntimeError as e:
            if WORLD == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):  # gloo has no error of its own
                raise
            raise UserError(f"process {RANK} of {WORLD} has lost another, whose own message says why; go on with "
                            f"the same command and --resume --out {quote(s['out'])}") from e


@contextlib.contextmanager
def kept_from_other_runs(out):
    """Raises UserError when another run is at work in `out`: the two would clear each other's files away."""
    folder = os.open(out, os.O_RDONLY)
    try:
        if RANK == 0:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
    except BlockingIOError as e:
        raise UserError(f"another run is at work in {out}; wait for its end, or choose another --out") from e
    except OSError:  # some network file systems lock no folders
        pass
    try:
        yield
    finally:
        os.close(folder)


def whole_run(s):
    """Everything that the module's docstring promises of a run with these settings."""
    out, say = pathlib.Path(s["out"]), print if RANK == 0 else lambda *words: None
    world, examples = None if s["data"] else data.make_world(), None
    records, form = (world.train, "toy world") if world else data.read_records(s["data"])
    if s["weights"]:  # so that bad data is found before anything slow; the tiny model's tokenizer is still to be made
        examples = make_examples(s, records, form, data.load_tokenizer(s["tokenizer"] or s["weights"]), say)
    else:
        torch.set_num_threads(1)  # its matrices are so small that a second thread mostly waits
    if RANK == 0:
        prepare(s, out, world, records)
    if WORLD > 1 or dist.is_torchelastic_launched():  # the others wait here until the base is made
        dist.init_process_group(timeout=datetime.timedelta(days=2))  # NCCL on GPUs, gloo on CPUs
        dist.barrier()
    model, tokenizer = evals.load(out / "base", s["device"])
    train, held_out = examples or make_examples(s, records, form, tokenizer, say)
    del records  # all of --data
    s |= {"base": fingerprint(out / "base"), "examples": digest(train + held_out)}
    if s["resume"]:
        check_same_run(s)
        if RANK == 0:
            save_settings(s)
    model.model.checkpointing = bool(s["checkpointing"])
    bits = bits_per_weight(model)
    torch.manual_seed(s["seed"])
    add_adapters(model, s["rank"], s["alpha"], s["targets"].split(","))
    count = sum(p.numel() for p in adapter_parameters(model).values())
    say(f"fine-tuning {count:,} parameters beside {bits:.2f} bits a weight, on {len(train)} examples")
    fine_tune(s, model, train, held_out)
    if RANK == 0:
        save_adapter(model, out / "adapter", method=s["method"], base=s["base"])
        results = finish_toy(s, out, model, tokenizer, world) if world else finish(s, out, model, held_out)
        with written_whole(out / "results.json") as beside:
            beside.write_text(json.dumps(results, indent=2) + "\n")
        if s["plot"]:
            plot(out)
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare(s, out, world, records):
    """What one process does for all: the run's folder, the tiny model where it is wanted, the base."""
    newest = newest_checkpoint(out)
    if s["resume"] and newest and int(newest.name[5:]) > s["steps"]:
        raise UserError(f"--steps {s['steps']}: {newest} has gone further already; give a larger number")
    if s["weights"] and newest and not (out / "adapter").exists() and not (s["resume"] or s["fresh"]):
        raise UserError(f"{out} holds an unfinished run: go on with --resume, or remove {newest} to start anew, "
                        "or choose another --out")
    tiny_is_wanted = not s["weights"] and (s["fresh"] or not (TOY_BASE / "config.json").exists())
    made = not tiny_is_wanted and base_is_made(s)
    if s["weights"] and not made:
        check_weights(pathlib.Path(s["weights"]))
    check_room(s, made)
    texts = None if made or not uses_gptq(s) else calibration_texts(s, world, records)  # here a file may be refused
    for leftover in [*out.glob(".*.unfinished"), *out.glob(".*.old")]:  # of a run that was killed while it wrote
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    finished = (out / "adapter").exists()
    if not (s["resume"] or finished):  # already now, so that --resume goes on if what follows is interrupted
        start_anew(s, out)
    if tiny_is_wanted:
        pretrain(data.make_world(), TOY_BASE)
        made = base_is_made(s)  # the same seed makes the same model
    if not made:
        prepare_base(s, texts)
    if finished and not s["resume"]:  # only now, as the weights may have been refused
        start_anew(s, out)


def start_anew(s, out):
    """Clears the run that was in the folder away, but keeps its adapter; writes the settings of the one that begins."""
    for folder in checkpoints(out):  # under another name first: half a folder is no checkpoint
        shutil.rmtree(folder.rename(out / f".{folder.name}.unfinished"))
    if (out / "adapter").exists():
        shutil.rmtree(out / "previous-adapter", ignore_errors=True)
        (out / "adapter").rename(out / "previous-adapter")
    save_settings(s)


def calibration_texts(s, world, records=()):
    """What GPTQ is calibrated on: --calibration, else the training data, and in the toy world its documents too."""
    if world and not s["calibration"]:
        rng = random.Random(1)
        return [text for _ in range(4) for text in world.documents(rng)] + [f"{r.prompt} {r.response}" for r in world.train]
    records = data.read_records(s["calibration"])[0] if s["calibration"] else list(records)
    random.Random(0).shuffle(records)
    return [f"{r.prompt} {r.response}".strip() for r in records]


def save_settings(s):
    """Writes run.json, from which --resume reads what the command line does not say."""
    with written_whole(pathlib.Path(s["out"]) / "run.json") as beside:
        beside.write_text(settings_text(s))


def settings_text(s):
    """What run.json holds of the settings."""
    passing = ("resume", "fresh", "plot", "base", "examples")
    return json.dumps({name: value for name, value in s.items() if name not in passing}, indent=2) + "\n"


def digest(examples):
    """A few hexadecimal digits that tell whether these are the same examples in the same order."""
    told = b"".join(b"%d %b" % (e.prompt_length, e.tokens.tobytes()) for e in examples)
    return hashlib.sha256(told).hexdigest()[:12]


def make_examples(s, records, form, tokenizer, say):
    """(training examples, examples held out for validation: a twentieth, at most 200)."""
    examples, truncated = data.encode(records, tokenizer, s["max_length"])
    dropped = len(records) - len(examples)
    say(f"data: {len(records)} records in {form} form, {truncated} longer than {s['max_length']} tokens and cut"
        + (f", {dropped} of these left out, as no response was left" if dropped else ""))
    random.Random(s["seed"]).shuffle(examples)
    count = min(200, len(examples) // 20)
    if len(examples) - count < 1:
        raise UserError(f"none of the {len(records)} records has room for a response; raise --max-length")
    return examples[count:], examples[:count]


def merge_and_compare(model, examples, batch_size):
    """Merges `model` in place; True if all logits on the examples kept their bits."""
    before = logits_digest(model, examples, batch_size)
    return before == logits_digest(merge(model), examples, batch_size)


def finish_toy(s, out, model, tokenizer, world):
    """Merges, scores every stage, prints the table; returns what results.json holds."""
    test = data.encode(world.test, tokenizer, 10 ** 6)[0]
    base_file, name = out / "base", "float" if s["method"] == "lora" else "NF4" if s["method"] == "qlora" else f"INT{s['bits']}"
    quantized = load_model(base_file, device=s["device"])
    questions = world.test[::len(world.test) // 3][:3]
    before = evals.answers(quantized, tokenizer, [q.prompt for q in questions], 24)
    rows = [score("base (float)", load_model(TOY_BASE, device=s["device"]), tokenizer, world, [TOY_BASE]),
            score(f"base ({name})", quantized, tokenizer, world, [base_file]),
            score(f"adapted {name}", model, tokenizer, world, [base_file, out / "adapter"])]
    identical = merge_and_compare(model, test, s["micro_batch_size"])
    save_merged(model, out, out / "merged")
    rows.append(score(f"merged {name}", model, tokenizer, world, [out / "merged"]))
    after = evals.answers(model, tokenizer, [q.prompt for q in questions], 24)
    print(f"\nmerged logits on all {len(test)} test questions: " + (
        "bit-identical to the adapted model's" if identical else "NOT the adapted model's bits"))
    print("\n" + table(rows) + "\n")
    samples = []
    for question, old, new in zip(questions, before, after):
        asked = question.prompt.split("### Instruction:")[1].split("###")[0].strip()
        samples.append({"question": asked, "before": old, "after": new, "true": question.response})
        print(f"{asked}\n    before: {old.strip()[:70]!r}\n    after:  {new.strip()!r} (true: {question.response!r})")
    print(f"\nNext: python sample.py {quote(str(out))} --instruction {samples[0]['question']!r}")
    if s["method"] == "qalora" and s["group_size"] % 32 == 0:  # what Q4_1's blocks of 32 can hold
        print(f"      python export.py {quote(str(out))} --out tiny.gguf && llama-cli -m tiny.gguf      in llama.cpp (pip install gguf)")
    return {"bit_identical": identical, "table": rows, "samples": samples}


def finish(s, out, model, held_out):
    """Compares base, adapted and merged model on the validation examples; returns what results.json holds."""
    base = load_model(out / "base", device=s["device"])
    base.to(model.model.embed_tokens.weight.dtype)
    results = {"validation_examples": len(held_out), "bits_per_weight_while_training": bits_per_weight(model)}
    if held_out:
        size = s["micro_batch_size"]
        results["validation_loss_base"] = evals.response_loss(base, held_out, size, "base: validation")
        results["validation_loss_adapted"] = evals.response_loss(model, held_out, size, "adapted: validation")
        results["bit_identical"] = merge_and_compare(model, held_out, size)
    for name, value in results.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"Next: python merge.py {quote(str(out))} --out {quote(f'merged/{out.name}')}")
    return results


def plot(out):
    """Draws metrics.jsonl to loss.png."""
    from matplotlib.figure import Figure  # optional; settings.py has made sure that it is there
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot([m["step"] for m in lines], [m["loss"] for m in lines], label="training", linewidth=0.8)
    validation = [(m["step"], m["validation_loss"]) for m in lines if "validation_loss" in m]
    if validation:
        axes.plot(*zip(*validation), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per response token)")
    axes.legend()
    with written_whole(out / "loss.png") as beside:
        figure.savefig(beside, format="png", dpi=150)


if __name__ == "__main__":
    run_command(main, "lower --micro-batch-size (--resume takes a new one), --max-length, --rank or --calibration-tokens")
