"""Folding adapters into the quantized model: offset <- offset + s * B @ A; nothing else changes.

    python merge.py runs/7b --out merged/7b
    python merge.py --base GPTQ_DIR --adapter PEFT_DIR --out merged/theirs    (formats/peft.py)

The result has the same codes and scales, needs no adapter, and returns the adapted model's bits.
"""

import pathlib

from torch import nn

from baselines import LoRALinear
from cli.errors import Parser, UserError, run_command
from cli.files import check_new
from qalora import QALoRALinear


def merge(module: nn.Module) -> nn.Module:
    """Replaces every adapted layer in `module` by its merged one, in place; returns the module.

    If `module` itself is an adapted layer, returns its merged layer. UserError if there is none.
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
    """Merges the adapter of a finished run, or one from PEFT, into a new model folder."""
    from formats import peft, run  # here, because they import this module

    parser = Parser(prog="merge.py", description=__doc__)
    add = parser.add_argument
    add("run", nargs="?", type=pathlib.Path, help="the folder of a finished run of train.py")
    add("--base", type=pathlib.Path, help="or a quantized model")
    add("--adapter", type=pathlib.Path, help="and a QA-LoRA adapter over it, in PEFT's folder")
    add("--out", type=pathlib.Path, required=True, help="folder for the merged model")
    args = parser.parse_args()
    given = [name for name in ("run", "base", "adapter") if getattr(args, name)]
    if given not in (["run"], ["base", "adapter"]):
        parser.error("name a run, or else --base MODEL and --adapter PEFT_DIR")
    check_new(args.out)
    if args.run:
        run.save_merged(run.load_run(args.run), args.run, args.out)
    else:
        peft.save_merged(args.base, args.adapter, args.out)
    print(f"merged {args.run or args.adapter} into {args.out}")


if __name__ == "__main__":
    run_command(main)
