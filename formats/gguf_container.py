"""What reading and writing GGUF share: the package, llama.cpp's names, bytes in their places."""

import pathlib
from collections.abc import Callable
from types import ModuleType

from cli.errors import UserError

TENSORS = {  # llama.cpp's name of each module
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "rope_freqs": "rope_freqs",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_package() -> ModuleType:
    """The `gguf` module; UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "reading and writing GGUF needs the gguf package; run: pip install gguf"
        ) from None
    return gguf


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    module, prefix = name.removesuffix(".weight"), ""
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        prefix = f"blk.{layer}."
    return f"{prefix}{TENSORS[module]}.weight"


def write_tensors(
    path: pathlib.Path, start: int, places: list[tuple[int, Callable]], size: int
) -> None:
    """Writes tensors into a file that has its header, and makes it `size` bytes long.

    places: for each tensor its offset after `start`, and a function that returns it.
    """
    with path.open("r+b") as f:
        for offset, read in places:
            f.seek(start + offset)
            f.write(read().contiguous().numpy())
        f.truncate(size)
