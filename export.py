"""A quantized model as a GGUF Q4_1 file, for llama.cpp, or as a folder for MLX.

    python export.py merged/7b --out llama-7b.Q4_1.gguf
    llama-cli -m llama-7b.Q4_1.gguf                  (or any other program that reads GGUF)
    python train.py --weights model.Q4_1.gguf --data alpaca.json

    python export.py merged/7b --out llama-7b-mlx
    mlx_lm.generate --model llama-7b-mlx --prompt "Name three primary colours."

Codes are copied. In GGUF scales and offsets are float16, to which offsets round, and scales where
an imported model has finer ones; in MLX's folders nothing need round, and codes of 2 and 3 bits
keep their size. `formats/gguf.py` and `formats/mlx.py` say how.
"""

import pathlib
from types import ModuleType

import torch

import formats
from cli.errors import Parser, UserError, run_command
from cli.files import check_new, new_file, written_whole
from formats import gguf, mlx
from formats.gguf_back import kinds_now, write_back
from formats.gguf_container import gguf_package
from formats.groups import layers_in_groups, rounding
from formats.rest import GGUF_REST, MLX_REST, rest_of


def export(folder: pathlib.Path, path: pathlib.Path, embeddings: str | None = None) -> list[str]:
    """Writes the model of a folder as the GGUF file `path`; returns the lines to print.

    embeddings: "f16" (the default) or "f32". Raises UserError for a model that Q4_1 cannot hold.
    """
    gguf_package()
    check_other(folder, gguf)
    model = formats.load_model(folder)
    layers = layers_in_groups(model)
    rest = rest_of(folder, GGUF_REST)
    kinds = kinds_now(layers, rest) if rest else dict.fromkeys(layers, "Q4_1")
    written = {name: layers[name] for name, kind in kinds.items() if kind == "Q4_1"}
    rounded = rounding(written, dict.fromkeys(written, (torch.float16, torch.float16)))
    if rest and embeddings:
        raise UserError(
            f"{folder} came from a GGUF file, whose embeddings are written back as they were; "
            "leave out --embeddings"
        )
    tokenizer = formats.load_tokenizer(folder)
    with written_whole(path) as beside:
        if rest:
            write_back(model, kinds, tokenizer, rest, beside)
            gguf.check_written(beside, model, rest)
        else:
            dtype = torch.float32 if embeddings == "f32" else torch.float16
            gguf.write_gguf(model, tokenizer, beside, dtype)
    lines = [f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB"]
    if written:
        lines.append(rounded)
    for bits in sorted({layer.bits for layer in layers.values()} - {4}):
        lines.append(
            f"its {bits}-bit codes take 4 bits each: Q4_1 has the same values, but is larger; an "
            "MLX folder keeps their size"
        )
    for size in sorted({layer.group_size for layer in layers.values()} - {32}):
        lines.append(f"its groups of {size} became blocks of 32 that repeat scale and offset")
    return lines


def export_mlx(source: pathlib.Path, out: pathlib.Path, scales: str | None = None) -> list[str]:
    """Writes a quantized model, or a run, as the MLX folder `out`; returns the lines to print.

    scales: "f16", "f32" or None, as `mlx.write_mlx` and `mlx.write_back` take it, which raise
    UserError for a model that MLX cannot hold.
    """
    check_other(source, mlx)
    model, tokenizer = formats.load_model(source), formats.load_tokenizer(source)
    rest = rest_of(source, MLX_REST)
    with written_whole(out) as beside:
        beside.mkdir()
        if rest:
            lines = mlx.write_back(model, tokenizer, rest, beside, scales)
        else:
            lines = mlx.write_mlx(model, tokenizer, beside, scales)
    size = sum(file.stat().st_size for file in out.iterdir())
    return [f"wrote {out}, {size / 1e6:.1f} MB", *lines]


def check_other(source: pathlib.Path, written: ModuleType) -> None:
    """Raises UserError for a model that is in the format already that is to be written."""
    if formats.format_of(source) is written:
        raise UserError(f"{source} is what would be written already; name a run, or a merged model")


def main() -> None:
    """Runs the command line."""
    parser = Parser(prog="export.py", description=__doc__)
    add = parser.add_argument
    add("model", type=pathlib.Path, help="a merged or quantized model, or a finished run")
    add("--out", type=pathlib.Path, required=True, help="NAME.gguf, or else an MLX folder")
    add("--embeddings", choices=["f16", "f32"], help="GGUF: type of embedding and head (f16)")
    add("--scales", choices=["f16", "f32"], help="MLX: type of scales and offsets (f32 if needed)")
    args = parser.parse_args()
    is_gguf = args.out.name.lower().endswith(".gguf")
    if is_gguf and args.scales:
        raise UserError("--scales is for an MLX folder; in GGUF they are float16")
    if args.embeddings and not is_gguf:
        raise UserError("--embeddings is for a .gguf file; in an MLX folder they are as they were")
    check_new(new_file(args.out) if is_gguf else args.out)
    if is_gguf:
        lines = export(args.model, args.out, args.embeddings)
    else:
        lines = export_mlx(args.model, args.out, args.scales)
    for line in lines:
        print(line)


if __name__ == "__main__":
    run_command(main)
