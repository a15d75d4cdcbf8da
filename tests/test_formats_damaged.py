"""A checkpoint gone wrong is one error that names file and tensor, and runs no code."""

import dataclasses
import json
import os

import pytest
import torch
from helpers import SMALL, random_model
from helpers_checkpoints import LAYOUTS, change, rewrite, write_checkpoint, write_hf
from hypothesis import given
from hypothesis import strategies as st

from cli.errors import UserError
from formats.files import open_file, weight_files
from llama import load_pretrained


@given(
    data=st.data(),
    layout=st.sampled_from(LAYOUTS),
    what=st.sampled_from(
        ["missing", "unexpected", "misshapen", "of no dimension", "integer", "nan", "-inf"]
    ),
)
def test_a_bad_tensor_is_one_error_that_names_file_and_tensor(tmp_path_factory, data, layout, what):
    folder = tmp_path_factory.mktemp("bad")
    model = random_model(dataclasses.replace(SMALL, num_key_value_heads=4))
    write_checkpoint(folder, model, layout)
    path = data.draw(st.sampled_from(weight_files(folder)))
    held = open_file(path)
    sizes = (
        "rope.freqs",
        "tok_embeddings.weight",
        "layers.0.feed_forward.w1.weight",
    )  # see the next test
    if layout == "meta1" and what == "missing":
        sizes += ("output.weight",)  # the head is then the embedding
    name = data.draw(st.sampled_from(sorted(name for name in held if name not in sizes)))
    if layout.startswith("meta") and "norm" in name and what in ("integer", "nan", "-inf"):
        path = weight_files(folder)[0]  # all shards hold the same norms; the first one's are read
    rewrite(path, lambda tensors: change(tensors, name, what))
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    if what == "unexpected":
        name = name.replace("weight", "bias") + " is unexpected"
    assert f"{path.name}: tensor {name}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"])
@pytest.mark.parametrize("what", ["missing", "misshapen", "of no dimension", "integer", "nan"])
def test_metas_tensors_that_tell_the_models_size_are_checked_against_the_others(
    tmp_path, name, what
):
    write_checkpoint(tmp_path, random_model(SMALL), "meta2")
    rewrite(tmp_path / "consolidated.01.pth", lambda tensors: change(tensors, name, what))
    with pytest.raises(
        UserError, match="consolidated.0[01].pth: tensor|params.json: intermediate_size"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_a_truncated_file_is_one_error_that_names_it(tmp_path_factory, layout, data):
    folder = tmp_path_factory.mktemp("truncated")
    write_checkpoint(
        folder, random_model(dataclasses.replace(SMALL, num_key_value_heads=4)), layout
    )
    path = data.draw(st.sampled_from(weight_files(folder)))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=path.name):
        load_pretrained(folder)


@pytest.mark.parametrize("layout", ["one.safetensors", "one.bin", "meta1"])
@given(data=st.data())
def test_a_corrupt_file_is_one_error_or_loads_never_anything_else(tmp_path_factory, layout, data):
    folder = tmp_path_factory.mktemp("corrupt")
    write_checkpoint(folder, random_model(SMALL), layout)
    (path,) = weight_files(folder)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        near = data.draw(
            st.sampled_from([len(content), 2000])
        )  # the beginning holds names, shapes and the pickle
        content[data.draw(st.integers(0, min(near, len(content)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(content)
    try:
        load_pretrained(folder)
    except UserError as e:
        assert "\n" not in str(e)


@pytest.mark.parametrize(
    "layout, missing, named",
    [
        (
            "many.bin",
            "pytorch_model-00002-of-00003.bin",
            "pytorch_model-00002-of-00003.bin: no such file",
        ),
        (
            "many.safetensors",
            "model-00003-of-00003.safetensors",
            "model-00003-of-00003.safetensors: no such file",
        ),
        ("meta4", "consolidated.02.pth", "consolidated.02.pth: no such file"),
        ("meta4", "consolidated.03.pth", r"consolidated.02.pth: .* is a shard missing"),
        ("meta1", "consolidated.00.pth", "consolidated.00.pth: no such file"),
    ],
)
def test_a_missing_file_is_named(tmp_path, layout, missing, named):
    write_checkpoint(
        tmp_path, random_model(dataclasses.replace(SMALL, num_key_value_heads=4)), layout
    )
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=named):
        load_pretrained(tmp_path)


def test_a_second_download_beside_metas_shards_is_none_of_them(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "meta2")
    (tmp_path / "consolidated.00 (1).pth").write_bytes(b"")
    assert all(map(torch.equal, load_pretrained(tmp_path).parameters(), model.parameters()))


@pytest.mark.parametrize(
    "weight_map, error",
    [
        (None, "index.json: weight_map"),
        ({"a": 1}, "index.json: weight_map"),
        ({"a": "../b.bin"}, "index.json: weight_map"),
        ({"a": "gone.bin"}, "gone.bin: no such file"),
        ({"a": "first.bin"}, "first.bin: tensor a is missing, though pytorch_model.bin.index.json"),
        ({"b": "first.bin", "c": "second.bin"}, "second.bin: tensor b is also in first.bin"),
        ({"b": "first.bin"}, "index.json: tensor model.embed_tokens.weight is missing"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(tmp_path, weight_map, error):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, "one.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    torch.save({"b": torch.ones(1)}, tmp_path / "first.bin")
    torch.save({"b": torch.ones(1), "c": torch.ones(1)}, tmp_path / "second.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=error):
        load_pretrained(tmp_path)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize(
    "content",
    [
        Attack(),
        {"a": Attack()},
        [torch.ones(1)],
        {"a": 1},
        {},
        {"a": {"b": torch.ones(1)}},
        {"a": torch.ones(3).to_sparse()},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_no_code(
    tmp_path, monkeypatch, content, legacy
):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path, random_model(SMALL), "one.bin")
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="pytorch_model.bin: not a file of weights"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    model = random_model(dataclasses.replace(SMALL, tie_word_embeddings=True))
    write_checkpoint(tmp_path, model, "one.bin")
    path, embedding = tmp_path / "pytorch_model.bin", model.model.embed_tokens.weight.detach()
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, embedding)
    for other in (embedding + 1, embedding.half(), embedding[:1]):
        head = {"lm_head.weight": other}
        rewrite(path, lambda tensors, head=head: tensors.update(head))
        with pytest.raises(UserError, match="pytorch_model.bin: tensor lm_head.weight"):
            load_pretrained(tmp_path)
