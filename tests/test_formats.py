"""A format is a module and a line in FORMATS; nothing else changes for it."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import same
from helpers_runs import options, refusal, run

import formats
from formats.files import checked_config
from formats.huggingface import load_float


class Odd:
    """Float weights as nobody keeps them: odd.json, and a folder of NumPy's files."""

    @staticmethod
    def matches(path):
        return (path / "odd.json").exists()

    @staticmethod
    def read_config(path):
        return checked_config(path / "odd.json", json.loads((path / "odd.json").read_text()))

    @staticmethod
    def files(path):
        return sorted(path.glob("odd*"))

    @staticmethod
    def quantization_of(path):
        return None

    @staticmethod
    def check(path):
        assert Odd.files(path)

    @staticmethod
    def open_weights(path):
        def read(name):
            return torch.from_numpy(np.load(path / f"odd.{name}.npy"))

        names = [file.name[4:-4] for file in path.glob("odd.*.npy")]
        return Odd.read_config(path), {name: functools.partial(read, name) for name in names}

    @staticmethod
    def load_model(path, dtype=None, device="cpu"):
        return load_float(Odd.open_weights(path), dtype, device)


def test_a_new_format_is_a_module_and_a_line_in_the_table(world, tmp_path, monkeypatch):
    odd, out = tmp_path / "odd", tmp_path / "run"
    odd.mkdir()
    shutil.copy(world / "weights" / "config.json", odd / "odd.json")
    shutil.copy(world / "weights" / "tokenizer.model", odd)
    model = formats.load_model(world / "weights", torch.float32)
    for name, p in model.named_parameters():
        np.save(odd / f"odd.{name}.npy", p.detach().numpy())
    assert "found none of" in refusal(monkeypatch, *options(world, out, weights=odd))
    monkeypatch.setattr(formats, "FORMATS", {Odd: "odd.json", **formats.FORMATS})
    assert same(formats.load_model(odd).parameters(), model.parameters())
    words = options(world, out, weights=odd, steps=1)
    run(tmp_path / "log", words)
    assert "already made from these weights" in run(tmp_path / "log", words)
    np.save(odd / "odd.model.norm.weight.npy", 2 * model.model.norm.weight.detach().numpy())
    assert "making it again" in run(tmp_path / "log", words)
    assert "odd.json that is no run's" in refusal(monkeypatch, *options(world, odd))


def a_run(world, whole, folder):
    return shutil.copytree(whole, folder)


def a_meta_folder(world, whole, folder):
    folder.mkdir()
    torch.save({"norm.weight": torch.ones(4)}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text("{}")
    return folder


def a_gguf_file(world, whole, folder):
    folder.mkdir()
    (folder / "model.gguf").write_bytes(bytes(1000))
    return folder / "model.gguf"


@pytest.mark.parametrize(
    "make, files",
    [
        (a_run, ["base/config.json", "base/model.safetensors", "adapter/adapter.safetensors"]),
        (a_meta_folder, ["params.json", "consolidated.00.pth"]),
        (a_gguf_file, [""]),
    ],
)
def test_models_that_differ_in_any_file_have_other_fingerprints(
    world, whole, tmp_path, make, files
):
    path = make(world, whole, tmp_path / "model")
    seen = [formats.fingerprint(path)]
    for name in files:
        with (path / name).open("ab") as file:
            file.write(b" ")
        seen.append(formats.fingerprint(path))
    assert len(set(seen)) == len(files) + 1
