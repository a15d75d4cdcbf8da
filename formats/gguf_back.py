"""A GGUF file written back as it was, but for the layers that were tuned.

Beside a base that came from a GGUF file stands gguf.safetensors: the header, every tensor that is
no layer in groups, the heads of Q4_K blocks, and where all of it lay. A layer that was not tuned is
written in its own kind of blocks, one that was as Q4_1, with the same codes. So what fine-tuning
did not change comes out byte for byte, and a file of Q4_1 has the same bytes but for its offsets.
"""

import functools
import pathlib
import struct
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from formats.gguf_blocks import (
    HEAD,
    IN_GROUPS,
    heads_of_q4_k,
    in_file_order,
    in_our_order,
    is_unchanged,
    rotary_heads,
    to_q4_0,
    to_q4_1,
    to_q4_k,
)
from formats.gguf_container import gguf_name, gguf_package, write_tensors
from formats.gguf_vocabulary import with_format
from formats.rest import Rest, damaged, save_rest
from llama import Llama, LlamaConfig
from quant import QuantLinear
from text.tokenizer import Tokenizer


def keep_rest(reader: Any, kinds: dict[str, str], config: LlamaConfig, path: pathlib.Path) -> None:
    """Keeps what `write_back` needs of an opened file; kinds: the types of layers in groups.

    The layout has these by our names, and the size of the file.
    """
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
    save_rest(path, kept, {"kinds": kinds, "size": len(reader.data)})


def kinds_now(layers: dict[str, QuantLinear], rest: Rest) -> dict[str, str]:
    """The type in which each layer in groups is written: its own while nothing changed, or Q4_1.

    Raises UserError where the rest is not of these layers.
    """
    before = rest.layout.get("kinds")
    if not isinstance(before, dict) or before.keys() != layers.keys():
        raise damaged(rest.path)
    kinds = {}
    for name, layer in layers.items():
        head = rest.tensors.get(gguf_name(f"{name}.weight"))
        groups = layer.offset.numel() // 8
        fits = head is None or head.numel() == groups * HEAD
        if before[name] not in IN_GROUPS or (head is None) == (before[name] == "Q4_K") or not fits:
            raise damaged(rest.path)
        kinds[name] = before[name] if is_unchanged(layer, before[name], head) else "Q4_1"
    return kinds


def write_back(
    model: Llama, kinds: dict[str, str], tokenizer: Tokenizer, rest: Rest, path: pathlib.Path
) -> None:
    """Writes the GGUF file that a model came from, with the layers in groups as they are now.

    kinds: from `kinds_now`. Where the tokenizer has another chat template than the file, that is
    replaced as well. Raises UserError where the rest is damaged.
    """
    readers = {}
    for name, tensor in rest.tensors.items():
        readers[name] = functools.partial(Tensor.contiguous, tensor)
    for name, kind in kinds.items():
        layer, file_name = model.get_submodule(name), gguf_name(f"{name}.weight")
        more = rest.tensors.get(file_name), rotary_heads(name, model.config)
        readers[file_name] = functools.partial(to_blocks, layer, kind, *more)
    try:
        before = readers.pop("header")().numpy().tobytes()
        path.write_bytes(before)
        size = rest.layout["size"]
        if not 0 < size < 2**44:
            raise damaged(rest.path)
        write_tensors(path, 0, [], size)  # GGUFReader wants the whole length
        reader = gguf_package().GGUFReader(path)
        data_end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)
        if size > data_end + 2**16:  # more than padding
            raise damaged(rest.path)
        file_kinds = {gguf_name(f"{name}.weight"): kind for name, kind in kinds.items()}
        places, end = places_now(reader, file_kinds)
        header = with_format(with_kinds(before, reader, places), reader, tokenizer)
        moved = [(place, readers.pop(name)) for name, (_, place) in places.items()]
    except OSError:
        raise
    except Exception:  # a damaged header can raise anything: the parser is not ours
        raise damaged(rest.path) from None
    if readers:
        raise damaged(rest.path)
    path.write_bytes(header)
    write_tensors(path, len(header), moved, len(header) + end)


def to_blocks(layer: QuantLinear, kind: str, head: Tensor | None, heads: int | None) -> Tensor:
    """A layer's blocks of a kind, in the file's order of rows; head: of Q4_K blocks."""
    if kind == "Q4_K":
        return in_file_order(to_q4_k(layer, head), heads)
    return in_file_order(to_q4_0(layer) if kind == "Q4_0" else to_q4_1(layer), heads)


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
