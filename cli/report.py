"""What a run shows at its end: whether merging kept every bit, and how good the model is."""

import hashlib
import json
import pathlib
from shlex import quote

import torch
from torch import nn

import evals
import formats
from cli.files import write_json, written_whole
from cli.measure import bits_per_weight
from cli.settings import Settings
from cli.toy import TOY_BASE, score, table
from formats.run import save_merged
from merge import merge
from text.batches import Example, collate, encode, encode_asking
from text.tokenizer import Tokenizer
from text.toy import World


def merge_and_compare(model: nn.Module, examples: list[Example], batch_size: int) -> bool:
    """Merges `model` in place; whether all its logits on the examples kept their bits."""
    before = logits_digest(model, examples, batch_size)
    return before == logits_digest(merge(model), examples, batch_size)


@torch.inference_mode()
def logits_digest(model: nn.Module, examples: list[Example], batch_size: int) -> str:
    """SHA-256 over the bits of all logits of the examples: equal digests mean equal logits."""
    assert examples, "the digest of nothing would be equal to any other"
    sha = hashlib.sha256()
    device = next(model.parameters()).device
    for i in range(0, len(examples), batch_size):
        tokens_BT, _ = collate(examples[i : i + batch_size])
        logits = model(tokens_BT.to(device))
        sha.update(logits.cpu().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def conclude(
    settings: Settings,
    model: nn.Module,
    tokenizer: Tokenizer,
    world: World | None,
    train: list[Example],
    held_out: list[Example],
) -> None:
    """Merges `model` and judges it; writes results.json, and loss.png where that is wanted."""
    out = pathlib.Path(settings.out)
    if world:
        results = merge_and_judge_toy(settings, model, tokenizer, world)
    else:
        results = merge_and_judge(settings, model, train, held_out)
    write_json(results, out / "results.json")
    if settings.plot:
        plot(out)


def merge_and_judge(
    settings: Settings, model: nn.Module, train: list[Example], held_out: list[Example]
) -> dict:
    """Merges `model` and compares it with the base and with what it was, on validation examples.

    Where there are none, only the bits are compared, on the first training examples. Prints and
    returns what results.json holds.
    """
    out, size = pathlib.Path(settings.out), settings.micro_batch_size
    base = formats.load_model(out / "base", device=settings.device)
    base.to(model.model.embed_tokens.weight.dtype)
    results = {
        "validation_examples": len(held_out),
        "bits_per_weight_while_training": bits_per_weight(model),
    }
    if held_out:
        loss = evals.response_loss(base, held_out, size, "base: validation")
        results["validation_loss_base"] = loss
        loss = evals.response_loss(model, held_out, size, "adapted: validation")
        results["validation_loss_adapted"] = loss
    results["bit_identical"] = merge_and_compare(model, held_out or train[:4], size)
    for name, value in results.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"Next: python merge.py {quote(str(out))} --out {quote(f'merged/{out.resolve().name}')}")
    return results


def merge_and_judge_toy(
    settings: Settings, model: nn.Module, tokenizer: Tokenizer, world: World
) -> dict:
    """Merges `model`, scores every stage in the toy world; prints and returns the results."""
    out, device = pathlib.Path(settings.out), settings.device
    test = encode(world.test, tokenizer, 10**6)[0]
    questions = world.test[:: len(world.test) // 3][:3]
    prompts = [encode_asking([asked], tokenizer) for asked, _ in questions]
    name = {"lora": "float", "qlora": "NF4"}.get(settings.method, f"INT{settings.bits}")
    files = [out / "base"]
    base = formats.load_model(out / "base", device=device)
    unquantized = formats.load_model(TOY_BASE, device=device)
    before = evals.answers(base, tokenizer, prompts, 24)
    rows = [
        score("base (float)", unquantized, tokenizer, world, [TOY_BASE]),
        score(f"base ({name})", base, tokenizer, world, files),
        score(f"adapted {name}", model, tokenizer, world, [*files, out / "adapter"]),
    ]
    identical = merge_and_compare(model, test, settings.micro_batch_size)
    save_merged(model, out, out / "merged")
    rows.append(score(f"merged {name}", model, tokenizer, world, [out / "merged"]))
    after = evals.answers(model, tokenizer, prompts, 24)
    verdict = "bit-identical to" if identical else "NOT the same bits as"
    print(f"\nmerged logits on all {len(test)} test questions: {verdict} the adapted model's")
    print(f"\n{table(rows)}\n")
    samples = show_answers(questions, before, after)
    # Q4_1's blocks are 32 long
    exportable = settings.method == "qalora" and settings.group_size % 32 == 0
    show_next(out, samples[0]["question"], exportable)
    return {"bit_identical": identical, "table": rows, "samples": samples}


def show_answers(questions: list, before: list[str], after: list[str]) -> list[dict]:
    """Prints what the model answers before and after fine-tuning; returns it."""
    samples = []
    for (asked, answer), old, new in zip(questions, before, after, strict=True):
        answers = {"before": old, "after": new, "true": answer.text}
        samples.append({"question": asked.text, **answers})
        print(asked.text)
        print(f"    before: {old.strip()[:70]!r}")
        print(f"    after:  {new.strip()!r} (true: {answer.text!r})")
    return samples


def show_next(out: pathlib.Path, question: str, exportable: bool) -> None:
    """Prints the commands that a user may want next; export.py where the model can go there."""
    folder = quote(str(out))
    print(f"\nNext: python sample.py {folder} --instruction {question!r}")
    if exportable:
        exporting = f"python export.py {folder} --out tiny.gguf"
        print(f"      {exporting} && llama-cli -m tiny.gguf      in llama.cpp (pip install gguf)")


def plot(out: pathlib.Path) -> None:
    """Draws metrics.jsonl to loss.png."""
    from matplotlib.figure import Figure  # optional

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    steps, losses = [m["step"] for m in lines], [m["loss"] for m in lines]
    axes.plot(steps, losses, label="training", linewidth=0.8)
    validated = [m for m in lines if "validation_loss" in m]
    if validated:
        steps, losses = [m["step"] for m in validated], [m["validation_loss"] for m in validated]
        axes.plot(steps, losses, "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per response token)")
    axes.legend()
    with written_whole(out / "loss.png") as beside:
        figure.savefig(beside, format="png", dpi=150)
