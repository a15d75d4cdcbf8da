"""A quantized model as a GGUF Q4_1 file, for llama.cpp and its relatives.

    python export.py merged/7b --out llama-7b.Q4_1.gguf
    llama-cli -m llama-7b.Q4_1.gguf                  (or any other program that reads GGUF)
    python train.py --weights model.Q4_1.gguf --data alpaca.json

Codes and scales are copied; only offsets round, to float16. `formats/gguf.py` says how.
"""

import pathlib

import torch

import formats
from cli.errors import Parser, UserError, run_command
from cli.files import check_new, new_file, written_whole
from formats.files import GGUF_REST
from formats.gguf import write_gguf
from formats.gguf_back import kinds_now, open_rest, write_back
from formats.gguf_blocks import quantized_layers, rounding
from formats.gguf_container import gguf_package


def export(folder: pathlib.Path, path: pathlib.Path, embeddings: str | None = None) -> list[str]:
    """Writes the model of a folder as the GGUF file `path`; returns the lines to print.

    embeddings: "f16" (the default) or "f32". Raises UserError for a model that Q4_1 cannot hold.
    """
    gguf_package()
    if folder.is_file():
        raise UserError(f"{folder} is no folder; name a folder with a model or a run")
    model = formats.load_model(folder)
    layers = quantized_layers(model)
    layer = next(iter(layers.values()))
    rests = (folder / GGUF_REST, folder / "base" / GGUF_REST)
    rest = next((open_rest(file) for file in rests if file.exists()), None)
    kinds = kinds_now(model, rest) if rest else dict.fromkeys(layers, "Q4_1")
    rounded = rounding({name: layers[name] for name, kind in kinds.items() if kind == "Q4_1"})
    if rest and embeddings:
        raise UserError(
            f"{folder} came from a GGUF file, whose embeddings are written back as they were; "
            "leave out --embeddings"
        )
    tokenizer = formats.load_tokenizer(folder)
    with written_whole(path) as beside:
        if rest:
            write_back(model, tokenizer, rest, beside)
        else:
            dtype = torch.float32 if embeddings == "f32" else torch.float16
            write_gguf(model, tokenizer, beside, dtype)
    lines = [f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB"]
    for what, (mean, largest) in rounded.items():
        if what == "offsets" or largest:
            lines.append(
                f"float16 rounds its {what} by {mean:.2g} of a quantization step on average, "
                f"{largest:.2g} at most"
            )
    if layer.bits < 4:
        lines.append(
            f"its {layer.bits}-bit codes take 4 bits each: Q4_1 has the same values, but is larger"
        )
    if layer.group_size > 32:
        lines.append(
            f"its groups of {layer.group_size} became blocks of 32 that repeat scale and offset"
        )
    return lines


def main() -> None:
    """Runs the command line."""
    parser = Parser(prog="export.py", description=__doc__)
    add = parser.add_argument
    add("folder", type=pathlib.Path, help="a merged or quantized model, or a finished run")
    add("--out", type=new_file, required=True, help="the GGUF file to write")
    add("--embeddings", choices=["f16", "f32"], help="type of embedding and output head (f16)")
    args = parser.parse_args()
    check_new(args.out)
    for line in export(args.folder, args.out, args.embeddings):
        print(line)


if __name__ == "__main__":
    run_command(main)
