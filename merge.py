"""Folding adapters into the quantized model: offset <- offset + s * B @ A; nothing else changes.

    python merge.py runs/7b --out merged/7b

The result has the same codes and scales, needs no adapter, and returns the same bits as the adapted
model.
"""

import pathlib

from torch import nn

from baselines import LoRALinear
from cli.errors import Parser, UserError, run_command
from cli.files import check_new
from qalora import QALoRALinear


def merge(module: nn.Module) -> nn.Module:
    """Replaces every adapted layer in `module` by its merged one, in place; returns the module.

    If `module` itself is an adapted layer, returns its merged layer. Raises UserError when there is
    no adapter.
    """
    adapted = (QALoRALinear, LoRALinear)
    if isinstance(module, adapted):
        return module.merged()
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, adapted)]
    if not layers:
        raise UserError("there is no adapter to merge")
    dtype = next(module.parameters()).dtype
    for name, layer in layers:
        merged = layer.merged().to(dtype)  # a QuantLinear ignores the dtype
        module.set_submodule(name, merged)
    return module


def main() -> None:
    """Merges the adapter of a finished run and writes the model into a new folder."""
    from formats.run import load_run, save_merged  # here, because it imports this module

    parser = Parser(prog="merge.py", description=__doc__)
    add = parser.add_argument
    add("run", type=pathlib.Path, help="the folder of a finished run of train.py")
    add("--out", type=pathlib.Path, required=True, help="folder for the merged model")
    args = parser.parse_args()
    if not (args.run / "run.json").exists():
        raise UserError(
            f"{args.run} is no run of train.py (it has no run.json): there is no adapter to merge"
        )
    check_new(args.out)
    save_merged(load_run(args.run), args.run, args.out)
    print(f"merged {args.run} into {args.out}")


if __name__ == "__main__":
    run_command(main)
