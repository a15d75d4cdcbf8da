"""A quantized model as a GGUF Q4_1 file, for llama.cpp, or as a folder for MLX.

    python export.py merged/7b --out llama-7b.Q4_1.gguf
    llama-cli -m llama-7b.Q4_1.gguf                  (or any other program that reads GGUF)
    python train.py --weights model.Q4_1.gguf --data alpaca.json

    python export.py merged/7b --out llama-7b-mlx
    mlx_lm.generate --model llama-7b-mlx --prompt "Name three primary colours."

Codes and scales are copied. In GGUF offsets round, to float16; in MLX's folders they need not, and
codes of 2 and 3 bits keep their size. `formats/gguf.py` and `formats/mlx.py` say how.
"""

import pathlib

import torch

import formats
from cli.errors import Parser, UserError, run_command
from cli.files import check_new, new_file, written_whole
from formats import mlx
from formats.files import GGUF_REST, MLX_REST
from formats.gguf import gguf_package, write_back, write_gguf
from formats.q4_1 import offset_rounding, quantized_layers


def export(folder: pathlib.Path, path: pathlib.Path, embeddings: str | None = None) -> list[str]:
    """Writes the model of a folder as the GGUF file `path`; returns the lines to print.

    embeddings: "f16" (the default) or "f32". Raises UserError for a model that Q4_1 cannot hold.
    """
    gguf_package()
    check_folder(folder)
    model = formats.load_model(folder)
    layer = next(iter(quantized_layers(model).values()))
    largest, mean = offset_rounding(model)
    rest = rest_of(folder, GGUF_REST)
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
    lines = [
        f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB",
        f"float16 rounds its offsets by {mean:.2g} of a quantization step on average, "
        f"{largest:.2g} at most",
    ]
    if layer.bits < 4:
        lines.append(
            f"its {layer.bits}-bit codes take 4 bits each: Q4_1 has the same values, but is larger"
        )
    if layer.group_size > 32:
        lines.append(
            f"its groups of {layer.group_size} became blocks of 32 that repeat scale and offset"
        )
    return lines


def export_mlx(folder: pathlib.Path, out: pathlib.Path, scales: str | None = None) -> list[str]:
    """Writes the model of a folder as the MLX folder `out`; returns the lines to print.

    scales: "f16", "f32" or None, as `mlx.write_mlx` and `mlx.write_back` take it, which raise
    UserError for a model that MLX cannot hold.
    """
    check_folder(folder)
    model, tokenizer = formats.load_model(folder), formats.load_tokenizer(folder)
    rest = rest_of(folder, MLX_REST)
    with written_whole(out) as beside:
        beside.mkdir()
        if rest:
            lines = mlx.write_back(model, tokenizer, rest, beside, scales)
        else:
            lines = mlx.write_mlx(model, tokenizer, beside, scales)
    size = sum(file.stat().st_size for file in out.iterdir())
    return [f"wrote {out}, {size / 1e6:.1f} MB", *lines]


def check_folder(path: pathlib.Path) -> None:
    """Raises UserError for a file."""
    if path.is_file():
        raise UserError(f"{path} is no folder; name a folder with a model or a run")


def rest_of(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """What a model or the base of a run has kept of the file that it came from, if it has."""
    files = (folder / name, folder / "base" / name)
    return next((file for file in files if file.exists()), None)


def main() -> None:
    """Runs the command line."""
    parser = Parser(prog="export.py", description=__doc__)
    add = parser.add_argument
    add("folder", type=pathlib.Path, help="a merged or quantized model, or a finished run")
    add("--out", type=pathlib.Path, required=True, help="NAME.gguf, or else an MLX folder")
    add("--embeddings", choices=["f16", "f32"], help="GGUF: type of embedding and head (f16)")
    add("--scales", choices=["f16", "f32"], help="MLX: type of scales and offsets (f32 if needed)")
    args = parser.parse_args()
    is_gguf = args.out.suffix.lower() == ".gguf"
    if is_gguf and args.scales:
        raise UserError("--scales is for an MLX folder; in GGUF they are float16")
    if args.embeddings and not is_gguf:
        raise UserError("--embeddings is for a .gguf file; in an MLX folder they are as they were")
    check_new(new_file(args.out) if is_gguf else args.out)
    if is_gguf:
        lines = export(args.folder, args.out, args.embeddings)
    else:
        lines = export_mlx(args.folder, args.out, args.scales)
    for line in lines:
        print(line)


if __name__ == "__main__":
    run_command(main)
