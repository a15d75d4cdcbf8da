"""A GGUF file written back as it was, but for the layers that were tuned.

Beside a base that came from a GGUF file stands gguf.safetensors: the header, every tensor that is
no layer in groups, the heads of Q4_K blocks, and where all of it lay. A layer that was not tuned is
written in its own kind of blocks, one that was as Q4_1, with the same codes. So what fine-tuning
did not change comes out byte for byte, and a file of Q4_1 has the same bytes but for its offsets.
"""

import functools
import json
import pathlib
import struct
from collections import Counter
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from cli.errors import UserError
from cli.files import written_whole
from formats.files import open_file
from formats.gguf_blocks import (
    heads_of_q4_k,
    in_file_order,
    in_our_order,
    is_still,
    rotary_heads,
    to_q4_0,
    to_q4_1,
    to_q4_k,
)
from formats.gguf_container import gguf_name, gguf_package, write_tensors
from formats.gguf_vocabulary import with_format
from formats.groups import layers_in_groups
from llama import Llama, LlamaConfig
from quant import QuantLinear
from text.tokenizer import Tokenizer


class Rest(NamedTuple):
    """What was kept of a GGUF file."""

    header: bytes
    size: int  # of the whole file
    kinds: dict[str, str]  # the type of each layer in groups, by our names
    tensors: dict[str, Tensor]  # bytes of the others, and heads of Q4_K blocks, by the file's names


def save_rest(reader: Any, kinds: dict[str, str], config: LlamaConfig, path: pathlib.Path) -> None:
    """Keeps what `write_back` needs of an opened file; kinds: as in a `Rest`."""
    in_groups = {gguf_name(f"{name}.weight"): name for name in kinds}
    kept = {"header": torch.from_numpy(reader.data[: reader.data_offset].copy())}
    for tensor in reader.tensors:
        name = in_groups.get(tensor.name)
        if name is None:
            end = tensor.data_offset + tensor.n_bytes
            kept[tensor.name] = torch.from_numpy(reader.data[tensor.data_offset : end].copy())
        elif kinds[name] == "Q4_K":
            heads = heads_of_q4_k(torch.from_numpy(tensor.data.copy()))
            kept[tensor.name] = in_our_order(heads, rotary_heads(name, config)).contiguous()
    layout = {"kinds": json.dumps(kinds), "size": str(len(reader.data))}
    with written_whole(path) as beside:
        save_file(kept, beside, metadata=layout)


def open_rest(path: pathlib.Path) -> Rest:
    """What `save_rest` kept; UserError where it is damaged."""
    kept = {name: stored.read() for name, stored in open_file(path).items()}
    with safetensors.safe_open(path, framework="pt") as file:
        layout = file.metadata() or {}
    if "header" not in kept or not {"kinds", "size"} <= layout.keys():
        raise UserError(
            f"{path} is damaged, or was not written by train.py; import the GGUF file again with "
            "train.py --fresh"
        )
    header = kept.pop("header").numpy().tobytes()
    return Rest(header, int(layout["size"]), json.loads(layout["kinds"]), kept)


def kinds_now(model: Llama, rest: Rest) -> dict[str, str]:
    """The type in which each layer in groups is written: its own while nothing changed, or Q4_1."""
    kinds = {}
    for name, layer in layers_in_groups(model).items():
        kind = rest.kinds[name]
        same = is_still(layer, kind, rest.tensors.get(gguf_name(f"{name}.weight")))
        kinds[name] = kind if same else "Q4_1"
    return kinds


def write_back(model: Llama, tokenizer: Tokenizer, rest: Rest, path: pathlib.Path) -> None:
    """Writes the GGUF file that a model came from, with the layers in groups as they are now.

    Where the tokenizer has another chat template than the file, that is replaced as well.
    """
    path.write_bytes(rest.header)
    write_tensors(path, 0, [], rest.size)  # GGUFReader wants a file of the whole length
    reader = gguf_package().GGUFReader(path)
    kinds = kinds_now(model, rest)
    readers = {name: functools.partial(Tensor.clone, t) for name, t in rest.tensors.items()}
    for name, layer in layers_in_groups(model).items():
        file_name = gguf_name(f"{name}.weight")
        order = rotary_heads(name, model.config)
        head = rest.tensors.get(file_name)
        readers[file_name] = functools.partial(to_blocks, layer, kinds[name], head, order)
    places, end = places_now(reader, {gguf_name(f"{n}.weight"): k for n, k in kinds.items()})
    header = with_format(with_kinds(rest.header, reader, places), reader, tokenizer)
    path.write_bytes(header)
    moved = [(place, readers[name]) for name, (_, place) in places.items()]
    write_tensors(path, len(header), moved, len(header) + end)


def to_blocks(layer: QuantLinear, kind: str, head: Tensor | None, order: int | None) -> Tensor:
    """A layer's blocks of a kind, in the file's order of rows."""
    if kind == "Q4_K":
        return in_file_order(to_q4_k(layer, head), order)
    return in_file_order(to_q4_0(layer) if kind == "Q4_0" else to_q4_1(layer), order)


def places_now(reader: Any, kinds: dict[str, str]) -> tuple[dict[str, tuple], int]:
    """({tensor: (type, place after the header)}, where the file ends after its header).

    kinds: the types of layers in groups by the file's names.
    """
    gguf, alignment = gguf_package(), int(reader.alignment)
    places, grown, end = {}, 0, 0
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        kind = tensor.tensor_type
        if tensor.name in kinds:
            kind = gguf.GGMLQuantizationType[kinds[tensor.name]]
        place = tensor.data_offset - reader.data_offset + grown
        places[tensor.name] = kind, place
        weights, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(tensor.n_elements) // weights * block_bytes
        grown += -(-size // alignment) * alignment
        grown -= -(-int(tensor.n_bytes) // alignment) * alignment
        end = place + size
    return places, max(end, len(reader.data) - reader.data_offset + grown)


def with_kinds(header: bytes, reader: Any, places: dict[str, tuple]) -> bytes:
    """The header, of the same length, with other types and places of tensors."""
    gguf, changed = gguf_package(), bytearray(header)
    before, now = Counter(), Counter()
    for tensor in reader.tensors:
        kind, place = places[tensor.name]
        parts = tensor.field.parts  # the last two are type and place
        at = tensor.field.offset + sum(part.nbytes for part in parts[:-2])
        struct.pack_into("<IQ", changed, at, kind, place)
        before[tensor.tensor_type] += int(tensor.n_elements)
        now[kind] += int(tensor.n_elements)
    field, q4_1 = reader.fields.get("general.file_type"), gguf.GGMLQuantizationType.Q4_1
    if field and now != before and now.most_common(1)[0][0] == q4_1:
        at = field.offset + sum(part.nbytes for part in field.parts[:-1])
        struct.pack_into("<I", changed, at, gguf.LlamaFileType.MOSTLY_Q4_1)
    return bytes(changed)
