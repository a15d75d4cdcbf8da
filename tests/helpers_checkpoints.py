"""Checkpoints as others write them, and ways to damage them."""

import dataclasses
import json

import safetensors.torch
import torch

META = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


HF_LAYOUTS = ["one.safetensors", "many.safetensors", "one.bin", "many.bin"]


# Meta's shards; since LLaMA-3 they split the embedding by rows
LAYOUTS = HF_LAYOUTS + ["meta1", "meta2", "meta4", "meta2rows"]


def shards_of(layout):
    """How many shards a layout of Meta's has; None for other layouts."""
    return int(layout[4]) if layout.startswith("meta") else None


def write_hf(folder, tensors, config, layout="one.safetensors", **fields):
    """A Hugging Face folder; `fields` override those of config.json, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **dataclasses.asdict(config),
        **fields,
    }
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in content.items() if v is not ...})
    )
    suffix = layout.split(".")[1]
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if layout.startswith("one"):
        save(tensors, folder / f"{stem}.{suffix}")
        return
    files = {name: f"{stem}-0000{1 + i % 3}-of-00003.{suffix}" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save({name: t.clone() for name, t in tensors.items() if files[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_meta(folder, tensors, config, shards, rows=False, **fields):
    """A folder like Meta's of tensors that have Hugging Face's names but Meta's order of rows.

    rows: the embedding is split by rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "dim": config.hidden_size,
        "multiple_of": 256,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
        "n_kv_heads": config.num_key_value_heads,
        "rope_theta": config.rope_theta,
        **fields,
    }
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(content))
    for shard in range(shards):
        held = {"rope.freqs": torch.ones(config.head_dim // 2)}
        for name, tensor in tensors.items():
            columns = "o_proj" in name or "down_proj" in name
            columns |= "embed_tokens" in name and not rows
            split = tensor
            if tensor.dim() == 2:
                split = tensor.chunk(shards, dim=1 if columns else 0)[shard]
            for hf, meta in META.items():
                name = name.replace(hf, meta) if hf + "." in name else name
            held[name] = split.clone()
        torch.save(held, folder / f"consolidated.{shard:02d}.pth")


def meta_rows(tensors, config):
    """The same model, with each head's rotary rows in Meta's order: channel i beside i + K/2."""
    K, ordered = config.head_dim, dict(tensors)
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            halves_of_heads = tensor.unflatten(0, (-1, 2, K // 2))  # [H, 2, K/2, D]
            ordered[name] = halves_of_heads.transpose(1, 2).flatten(0, 2)
    return ordered


def write_checkpoint(folder, model, layout, **fields):
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    if layout.startswith("meta"):
        tensors = meta_rows(tensors, model.config)
        rows = layout.endswith("rows")
        write_meta(folder, tensors, model.config, shards_of(layout), rows, **fields)
    else:
        write_hf(folder, tensors, model.config, layout, **fields)


def change(tensors, name, what):
    if what == "missing":
        del tensors[name]
    elif what == "unexpected":
        tensors[name.replace("weight", "bias")] = torch.zeros(3)
    elif what == "misshapen":
        tensors[name] = torch.cat((tensors[name], tensors[name]))
    elif what == "of no dimension":
        tensors[name] = torch.tensor(1.0)
    elif what == "integer":
        tensors[name] = tensors[name].to(torch.int8)
    else:
        tensors[name].view(-1)[-1] = float(what)


def rewrite(path, edit):
    """Reads a file of weights, lets `edit` change its tensors, and writes it again."""
    if path.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(path)
        edit(tensors)
        safetensors.torch.save_file(tensors, path)
    else:
        tensors = torch.load(path, weights_only=True)
        edit(tensors)
        torch.save(tensors, path)
