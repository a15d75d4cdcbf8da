"""Folding adapters into the quantized model: offset <- offset + s * B @ A, and nothing else changes.

    python merge.py runs/7b --out merged/7b

The result has the same codes and scales, needs no adapter, and returns the same bits as the adapted model.
"""

import hashlib
import pathlib
import shutil

from cli import Parser, UserError, run_command, written_whole
from data import load_tokenizer
from llama import load_pretrained, read_json, save_pretrained, weight_files
from nf4 import load_nf4
from qalora import LoRALinear, QALoRALinear, load_adapter
from quant import QuantLinear, load_quantized, quantization_of, save_quantized


def merge(module):
    """Replaces every adapted layer in `module` by its merged one, in place; returns the module.

    An adapted layer itself is returned merged. Raises UserError when there is no adapter.
    """
    if isinstance(module, (QALoRALinear, LoRALinear)):
        return module.merged()
    adapted = [(name, m) for name, m in module.named_modules() if isinstance(m, (QALoRALinear, LoRALinear))]
    if not adapted:
        raise UserError("there is no adapter to merge")
    dtype = next(module.parameters()).dtype
    for name, layer in adapted:
        module.set_submodule(name, layer.merged().to(dtype))  # a QuantLinear ignores it: it has no dtype of its own
    return module


def load_model(folder, dtype=None, device="cpu"):
    """The Llama of any folder: float, quantized or merged, or of a run (its base and adapter, merged in memory).

    dtype: what the float parts are cast to; None keeps what is stored. Raises UserError when the folder holds no
    model, a run is not finished, or a run's adapter was trained over another base than the one beside it.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name a folder with a model or a run")
    if (folder / "run.json").exists():
        return load_run(folder, dtype, device)
    quantization = quantization_of(folder)
    if quantization is None:
        return load_pretrained(folder, dtype, device)
    load = load_nf4 if quantization.get("quantizer") == "nf4" else load_quantized
    return load(folder, dtype, device)


def load_run(run, dtype=None, device="cpu"):
    """A run's base with the run's adapter merged into it; errors as for `load_model`."""
    if not (run / "adapter").is_dir():
        raise UserError(f"{run} has no finished adapter yet; go on with train.py --resume --out {run}")
    if not (run / "base").is_dir():
        raise UserError(f"{run}/base, the model that the adapter was trained over, is missing; copy it there again")
    model = load_model(run / "base", dtype, device)
    settings = load_adapter(model, run / "adapter")
    wanted, found = settings.get("base"), fingerprint(run / "base")
    if wanted != found:
        raise UserError(f"{run}/adapter was trained over the base {str(wanted)[:12]}, but {run}/base is "
                        f"{str(found)[:12]}: merged, they would be wrong; train again with --fresh")
    record, spelling = run / "base" / "made_from.json", run / "base" / "tokenizer.model"
    if record.exists() and hashlib.sha256(spelling.read_bytes()).hexdigest() != read_json(record).get("tokenizer"):
        raise UserError(f"{spelling} is not the one that the run was trained with; copy that one there again")
    return merge(model)


def check_new(folder):
    """Raises UserError unless `folder` is missing or empty: what is there may be somebody's only copy."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder; remove it or choose another --out")


def save_merged(model, run, folder):
    """Writes a merged model and the tokenizer of its run as a model folder that every script here accepts."""
    with written_whole(folder) as beside:
        beside.mkdir()
        (beside / "tokenizer.model").write_bytes(load_tokenizer(run / "base").serialized_model_proto())
        if (run / "base" / "gguf.safetensors").exists():  # what export.py writes back into a GGUF file
            shutil.copyfile(run / "base" / "gguf.safetensors", beside / "gguf.safetensors")
        quantized = any(isinstance(layer, QuantLinear) for layer in model.modules())
        (save_quantized if quantized else save_pretrained)(model, beside)


def fingerprint(weights):
    """SHA-256 over the config and over name, size and content of each weight file: of one above 64 MB, 4,096 samples.

    weights: a model folder or a file. That tells models apart, as even one block trained further differs in some of
    the samples, and never takes minutes.
    """
    sha, files = hashlib.sha256(), [weights]
    if weights.is_dir():
        configs = [weights / name for name in ("config.json", "params.json")]
        files = sorted(weight_files(weights) + [config for config in configs if config.is_file()])
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.name} {size}".encode())
        with open(file, "rb") as f:
            for start in range(0, size, max(2 ** 14, size // 4096)):
                f.seek(start)
                sha.update(f.read(2 ** 14))
    return sha.hexdigest()


def main():
    parser = Parser(prog="merge.py", description=__doc__)
    parser.add_argument("run", type=pathlib.Path, help="the folder of a finished run of train.py")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the merged model")
    args = parser.parse_args()
    if not (args.run / "run.json").exists():
        raise UserError(f"{args.run} is no run of train.py (it has no run.json): there is no adapter to merge")
    check_new(args.out)
    model = load_run(args.run)
    save_merged(model, args.run, args.out)
    print(f"merged {args.run} into {args.out}")


if __name__ == "__main__":
    run_command(main)
