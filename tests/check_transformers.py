"""Does transformers compute what we compute, and read what we write?

    pip install transformers
    python tests/check_transformers.py | tee results/transformers.txt

A person runs this; CI has no transformers, and compares with formulas in float64 in test_llama.py.
Small models of every shape have random weights, in float32. A folder that transformers saves is
read here; what is read is saved here, and transformers reads that. Logits are compared up to four
times the original context. It ends with status 1 where a relative error is above 1e-5, or a config
has changed on the way.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

from formats.huggingface import read_config, save_pretrained  # noqa: E402
from llama import CONFIGS, load_pretrained, rotary_table  # noqa: E402

LIMIT = 1e-5
TOKENS = 256
SMALL = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=TOKENS,
    rms_norm_eps=1e-5,
)
GROUPED = dict(num_key_value_heads=2)
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
SHAPES = {  # name: (class of transformers, what its config has beside SMALL)
    "LLaMA-1 and 2": ("Llama", {}),
    "grouped queries": ("Llama", GROUPED),
    "tied embeddings": ("Llama", dict(GROUPED, tie_word_embeddings=True)),
    "LLaMA-3": ("Llama", dict(GROUPED, rope_theta=5e5, eos_token_id=[1, 8, 9])),
    "LLaMA-3.1, 3.2: llama3 scaling": (
        "Llama",
        dict(GROUPED, rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    "linear scaling": ("Llama", dict(rope_parameters=LINEAR)),
    "heads of their own size": ("Llama", dict(GROUPED, head_dim=24)),
    "llama3 scaling, heads of their own size": (
        "Llama",
        dict(GROUPED, head_dim=24, rope_parameters=LLAMA3),
    ),
    "SmolLM2: 9 heads, 3 of them stored": (
        "Llama",
        dict(
            hidden_size=72,
            num_attention_heads=9,
            num_key_value_heads=3,
            rope_theta=1e5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "no BOS and no EOS": ("Llama", dict(bos_token_id=None, eos_token_id=None)),
    "Mistral without a window": ("Mistral", dict(GROUPED, sliding_window=None)),
    "Mistral, heads of their own size": (
        "Mistral",
        dict(GROUPED, head_dim=24, rope_theta=1e6, sliding_window=None),
    ),
    "Mistral, a window as wide as its context": ("Mistral", dict(GROUPED, sliding_window=TOKENS)),
}
failures = []


def report(what, found, good):
    """Prints one result and remembers a bad one."""
    print(f"  {what:42} {found}{'' if good else '   <-- FAILED'}", flush=True)
    if not good:
        failures.append(what)


def their_model(kind, fields):
    """A model of transformers whose weights make attention, gates and norms matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **fields})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5 if p.dim() == 2 else 1 + p / 3)
    return model


def relative_error(found, expected):
    """The largest difference by the largest expected magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def check_shape(name, kind, fields, folder):
    """From transformers to us in one file and in several, and back."""
    model = their_model(kind, fields)
    tokens = torch.randint(SMALL["vocab_size"], (2, TOKENS))
    expected, errors = model(tokens).logits, []
    for size in ("1GB", "50KB"):
        model.save_pretrained(folder / size, max_shard_size=size)
        ours = load_pretrained(folder / size)
        errors.append(relative_error(ours(tokens), expected))
    assert (folder / "50KB" / "model.safetensors.index.json").exists()
    save_pretrained(ours, folder / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "back", dtype=torch.float32)
    errors.append(relative_error(again.eval()(tokens).logits, expected))
    equal = read_config(folder / "back") == ours.config
    for field in ("head_dim", "bos_token_id", "eos_token_id", "rope_parameters"):
        equal &= getattr(again.config, field) == getattr(model.config, field)
    columns = "  ".join(f"{error:7.1e}" for error in errors)
    kept = "equal" if equal else "changed"
    report(name, f"{columns}  {kept}", max(errors) <= LIMIT and equal)


def check_named_sizes():
    """The rotary frequencies of the real sizes: a position's angle is a multiple of them."""
    print("\nrelative errors of the rotary table at position 1 of the sizes in llama.CONFIGS")
    for name, config in CONFIGS.items():
        fields = dataclasses.asdict(config)
        theirs = transformers.LlamaConfig(**fields)
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        cos, sin = rotary(torch.zeros(1), torch.tensor([[1]]))
        found = torch.cat(rotary_table(config, torch.tensor([1])), -1)
        half = config.head_dim // 2
        error = relative_error(found, torch.cat((cos[0, :, :half], sin[0, :, :half]), -1))
        report(name, f"{error:.1e}", error <= 1e-6)


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")]
    print(", ".join(versions))
    print("\nrelative errors of logits: a folder of transformers read here, one of several files,")
    print("ours read by transformers; then the configs on the way there and back")
    for name, (kind, fields) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            check_shape(name, kind, fields, pathlib.Path(folder))
    check_named_sizes()
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
