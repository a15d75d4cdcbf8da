"""The default run's tiny model: pretraining it on the toy world, and scoring it."""

import pathlib
import random

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evals
from cli.files import written_whole
from cli.measure import bits_per_weight
from formats.huggingface import save_pretrained
from llama import CONFIGS, Llama, LlamaConfig
from text.batches import token_stream, windows
from text.instructions import Record, Turn
from text.templates import alpaca_prompt
from text.tokenizer import Tokenizer, train_tokenizer
from text.toy import World

TOY_BASE = pathlib.Path("runs/tiny-base")


def pretrain(
    world: World,
    folder: str | pathlib.Path,
    config: LlamaConfig = CONFIGS["tiny"],
    steps: int = 1900,
    lr: float = 5e-3,
    seed: int = 0,
    batch_size: int = 16,
    length: int = 64,
    warmup: int = 1,
) -> None:
    """Trains a small LLaMA and its tokenizer on the world's documents; writes a model folder.

    In float32, with AdamW; the rate rises for `warmup` steps and falls to 0 in the second half.
    """
    torch.manual_seed(seed)
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    passes = [world.documents(rng) for _ in range(50)]
    prompts = [alpaca_prompt(asked.text) for asked, _ in world.train]
    with written_whole(folder) as beside:
        beside.mkdir()
        spelled = sum(passes[:4], prompts)  # more passes would crowd out the prompts' words
        tokenizer = train_tokenizer(spelled, beside / "tokenizer.model", config.vocab_size)
        tokens = token_stream(sum(passes, []), tokenizer)
        model = Llama(config)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

        def rate(step):
            return min(1, (step + 1) / warmup, 2 * (1 - step / steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        bar = tqdm(range(steps), "pretraining", unit="step")
        for _ in bar:
            batch = windows(tokens, batch_size, length + 1, draw)
            logits = model(batch[:, :-1]).flatten(0, 1)
            loss = F.cross_entropy(logits, batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        save_pretrained(model, beside)


def toy_calibration(world: World) -> list[Record]:
    """What GPTQ is calibrated on in the toy world: its documents, and questions with answers."""
    rng = random.Random(1)
    texts = []
    for _ in range(4):
        texts += world.documents(rng)
    return [(Turn("text", text),) for text in texts] + world.train


def score(
    label: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    world: World,
    files: list[pathlib.Path],
) -> dict:
    """One row of the default run's table. files: the folders that hold the model."""
    stream = token_stream(world.heldout, tokenizer)
    choices = evals.multiple_choice(
        model, tokenizer, world.choices, 256, f"{label}: multiple choice"
    )
    size = 0
    for folder in files:
        size += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "model": label,
        "exact_match": evals.exact_match(
            model, tokenizer, world.test, 8, 64, f"{label}: exact match"
        ),
        "multiple_choice": choices["accuracy"],
        "perplexity": evals.perplexity(model, stream, 64, f"{label}: perplexity", 64),
        "bits_per_weight": bits_per_weight(model),
        "megabytes": size / 1e6,
    }


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'':16}exact match  multiple choice  perplexity  bits per weight  file size"]
    for row in rows:
        lines.append(
            f"{row['model']:16}{row['exact_match']:10.1%}{row['multiple_choice']:17.1%}"
            f"{row['perplexity']:12.3f}{row['bits_per_weight']:17.3f}{row['megabytes']:8.2f} MB"
        )
    return "\n".join(lines)
