"""What llama.py promises: the LLaMA of the papers, every layout of its weights, one line for every bad checkpoint."""

import dataclasses
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import llama
from cli import UserError
from llama import CONFIGS, Cache, Llama, LlamaConfig, choose, generate, load_pretrained, open_weights, read_config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matmuls this small gain nothing from a second thread, and wait long for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------ the oracle and the helpers

def reference_logits(weights, config, tokens, interleaved=False):
    """LLaMA straight from its formulas in float64: [T, V]. Rotary numbers are complex, attention is a loop.

    `weights` in Hugging Face's names; `interleaved` pairs neighbouring channels, as Meta's own weights have it.
    """
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    H, KV = config.num_attention_heads, config.num_key_value_heads
    K = config.hidden_size // H
    frequency = config.rope_theta ** (-2 * np.arange(K // 2) / K)

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x) + config.rms_norm_eps) * weight

    def turn(x, position):
        first, second = (x[0::2], x[1::2]) if interleaved else (x[:K // 2], x[K // 2:])
        z = (first + 1j * second) * np.exp(1j * position * frequency)
        return np.concatenate([z.real, z.imag])  # q and k in the same order: their product does not mind which

    stream = [w["model.embed_tokens.weight"][t] for t in tokens]
    for i in range(config.num_hidden_layers):
        layer = lambda name: w[f"model.layers.{i}.{name}.weight"]
        normed = [norm(x, layer("input_layernorm")) for x in stream]
        heads_of = lambda name: [(layer(f"self_attn.{name}_proj") @ x).reshape(-1, K) for x in normed]
        q = [[turn(head, t) for head in heads] for t, heads in enumerate(heads_of("q"))]
        k = [[turn(head, t) for head in heads] for t, heads in enumerate(heads_of("k"))]
        v = heads_of("v")
        for t in range(len(tokens)):
            attended = []
            for h in range(H):
                g = h // (H // KV)  # the key-value head that query head h shares
                score = np.array([q[t][h] @ k[s][g] / np.sqrt(K) for s in range(t + 1)])
                p = np.exp(score - score.max())
                attended.append(sum(p[s] / p.sum() * v[s][g] for s in range(t + 1)))
            x = stream[t] + layer("self_attn.o_proj") @ np.concatenate(attended)
            y = norm(x, layer("post_attention_layernorm"))
            gate = layer("mlp.gate_proj") @ y
            stream[t] = x + layer("mlp.down_proj") @ (gate / (1 + np.exp(-gate)) * (layer("mlp.up_proj") @ y))
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, w["model.norm.weight"]) for x in stream])


def close(actual, expected, tolerance=1e-5):
    """Whether two arrays differ by at most `tolerance` of the larger one's greatest magnitude."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return actual.shape == expected.shape and (actual - expected).abs().max() <= tolerance * expected.abs().max()


@st.composite
def configs(draw, kv_heads=None, tied=st.booleans()):
    kv = draw(st.sampled_from([1, 2, 3]) if kv_heads is None else st.just(kv_heads))
    heads = kv * draw(st.sampled_from([1, 2, 3]))
    return LlamaConfig(
        vocab_size=draw(st.integers(3, 10)) * 4, hidden_size=heads * draw(st.sampled_from([2, 4, 8])),
        intermediate_size=draw(st.integers(1, 6)) * 4, num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])), rope_theta=draw(st.sampled_from([100.0, 1e4, 1e6])),
        tie_word_embeddings=draw(tied))


seeds = st.integers(0, 2**31)


def random_model(config, seed=0):
    """A model whose weights are large enough for attention, gates and norms to matter."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / p.shape[1] ** 0.5 if p.dim() == 2 else 1 + 0.3 * torch.randn(p.shape))
    return model


def exact_model(config, seed):
    """In float64: rounding, which narrow random models can amplify a thousandfold, decides no comparison."""
    return random_model(config, seed).double()


def random_tokens(config, batch, length, seed=0):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


SMALL = LlamaConfig(24, 16, 12, 2, 4, 2, max_position_embeddings=64)


# ------------------------------------------------------------------------------------ the model

@given(configs(), seeds, st.integers(1, 9))
def test_logits_are_those_of_the_formulas_in_float64(config, seed, length):
    model, tokens = exact_model(config, seed), random_tokens(config, 2, length, seed)
    logits = model(tokens).detach()
    for row in range(2):
        assert close(logits[row], reference_logits(model.state_dict(), config, tokens[row].tolist()))


def test_logits_of_a_real_llama_in_float32_are_those_of_the_formulas(material):
    model = load_pretrained(material("stories260K"))
    tokens = generate(model, torch.tensor([[1]]), 63)
    with torch.no_grad():
        logits = model(tokens)[0]
    assert logits.dtype == torch.float32
    assert close(logits, reference_logits(model.state_dict(), model.config, tokens[0].tolist()))


def test_a_real_llama_tells_its_story_word_for_word(material):
    model = load_pretrained(material("stories260K"))
    pieces = json.loads((material("stories260K") / "vocab.json").read_text(encoding="utf-8"))
    seen = []
    tokens = generate(model, torch.tensor([[1]]), 60, on_token=lambda token_B: seen.append(token_B.item()))
    assert "".join(pieces[t] for t in seen).startswith(
        " Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high")
    assert tokens[0].tolist() == [1] + seen


def test_parameters_bear_the_names_of_hugging_face_checkpoints_and_nothing_else_is_stored(material):
    with safetensors.safe_open(material("stories260K") / "model.safetensors", "pt") as file:
        names = set(file.keys())
    model = Llama(read_config(material("stories260K")))
    assert set(model.state_dict()) == names
    assert not list(model.buffers()), "a buffer would be cast by .to(dtype)"


@pytest.mark.parametrize("name, count", [
    ("tiny", 332_480), ("7b", 6_738_415_616), ("13b", 13_015_864_320), ("33b", 32_528_943_616),
    ("65b", 65_285_660_672), ("llama2-7b", 6_738_415_616), ("llama2-13b", 13_015_864_320),
    ("llama2-70b", 68_976_648_192)])
def test_the_named_sizes_have_the_published_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(CONFIGS[name]).parameters()) == count


@given(configs(), seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_decoding_with_the_cache_in_any_portions_equals_the_full_forward_pass(config, seed, portions):
    model, tokens = exact_model(config, seed), random_tokens(config, 2, sum(portions), seed)
    cache = Cache(config, 2, sum(portions), torch.float64, "cpu")
    with torch.no_grad():
        portioned = torch.cat([model(part, cache) for part in tokens.split(portions, dim=1)], dim=1)
        assert close(portioned, model(tokens), 1e-9)
    assert cache.length == sum(portions)


def test_a_full_cache_takes_no_more_tokens():
    cache = Cache(SMALL, 1, 3, torch.float32, "cpu")
    with torch.no_grad(), pytest.raises(AssertionError, match="4 tokens in a cache for 3"):
        random_model(SMALL)(random_tokens(SMALL, 1, 4), cache)


@given(configs(), seeds, st.integers(1, 8), st.integers(1, 5))
def test_padding_on_the_right_is_invisible(config, seed, length, padding):
    model, tokens = exact_model(config, seed), random_tokens(config, 2, length, seed)
    padded = F.pad(tokens, (0, padding), value=config.vocab_size - 1)
    with torch.no_grad():
        assert close(model(padded)[:, :length], model(tokens), 1e-9)


@given(configs(), seeds, st.integers(1, 8))
def test_kept_positions_have_the_logits_of_the_full_output(config, seed, length):
    model, tokens = exact_model(config, seed), random_tokens(config, 3, length, seed)
    keep = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    with torch.no_grad():
        kept = model(tokens, keep_BT=keep)
        assert kept.shape == (keep.sum(), config.vocab_size)
        assert not len(kept) or close(kept, model(tokens)[keep], 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_come_in_the_models_dtype_and_low_precision_stays_near(dtype):
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 40)
    with torch.no_grad():
        low = model.to(dtype)(tokens)
        rounded = model.to(torch.float32)(tokens)  # with the same, rounded weights but never rounded rotary angles
    assert low.dtype == dtype
    assert close(low, rounded, {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype])


def test_norm_statistics_of_half_precision_are_taken_in_float32():
    x = torch.full((4,), 300.0, dtype=torch.float16)  # its square is no float16 number
    assert torch.equal(llama.RMSNorm(4, 1e-6).half()(x), torch.ones(4, dtype=torch.float16))


@given(configs(), seeds)
def test_checkpointing_changes_neither_loss_nor_gradients(config, seed):
    model, tokens = random_model(config, seed), random_tokens(config, 2, 6, seed)
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.model.checkpointing = checkpointing
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpointing_keeps_fewer_bytes_for_the_backward_pass():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 8)
    kept = []
    for model.model.checkpointing in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            model(tokens)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2, kept


# ------------------------------------------------------------------------------------ generation

def greedy_without_cache(model, tokens_BT, count, eos):
    """What `generate` must return, from whole forward passes, a row at a time."""
    rows = []
    for row in tokens_BT.tolist():
        prompt = len(row)
        while len(row) < prompt + count and eos not in row[prompt:]:
            with torch.no_grad():
                row = row + [model(torch.tensor([row]))[0, -1].argmax().item()]
        rows.append(row)
    longest = max(map(len, rows))
    return torch.tensor([row + [eos] * (longest - len(row)) for row in rows])


@settings(max_examples=25)
@given(configs(), seeds, st.integers(1, 4), st.integers(0, 6), st.integers(0, 5))
def test_greedy_generation_is_the_argmax_of_full_passes_and_stops_at_eos(config, seed, length, count, end):
    model, tokens = exact_model(config, seed), random_tokens(config, 3, length, seed)
    free = greedy_without_cache(model, tokens, count, eos=None)
    assert torch.equal(generate(model, tokens, count), free)
    eos = free[0, min(length + end, free.shape[1] - 1)].item()  # a token that does come, sooner or later
    columns = []
    stopped = generate(model, tokens, count, eos_token_id=eos, on_token=columns.append)
    assert torch.equal(stopped, greedy_without_cache(model, tokens, count, eos))
    assert [c.tolist() for c in columns] == stopped[:, length:].T.tolist()


@given(seeds, st.floats(0.3, 3), st.floats(0.05, 1))
def test_sampling_draws_from_the_smallest_set_of_likeliest_tokens_that_reaches_top_p(seed, temperature, top_p):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
    p = (logits / temperature).exp().numpy()
    p /= p.sum()
    kept, mass = np.zeros(8), 0.0
    for token in sorted(range(8), key=lambda token: -p[token]):
        if mass >= top_p - 1e-6:  # a set that reaches top_p but for rounding may or may not be enough
            break
        kept[token], mass = p[token], mass + p[token]
    draws = choose(logits.expand(4000, 8), temperature, top_p, torch.Generator().manual_seed(seed))
    share = np.bincount(draws.numpy(), minlength=8) / 4000
    assert np.abs(share - kept / kept.sum()).max() < 0.05  # six standard deviations of a draw's share


def test_sampling_repeats_with_its_seed_and_a_vanishing_temperature_is_greedy():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 3)
    draw = lambda seed: generate(model, tokens, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(generate(model, tokens, 20, temperature=1e-37), generate(model, tokens, 20))
    assert choose(torch.tensor([[400.0, 500.0]]), 1e-37, 1.0).item() == 1  # 500 / 1e-37 would be infinite


# ------------------------------------------------------------------------------------ on disk

META = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
HF_LAYOUTS = ["one.safetensors", "many.safetensors", "one.bin", "many.bin"]
LAYOUTS = HF_LAYOUTS + ["meta1", "meta2", "meta4"]


def write_hf(folder, tensors, config, layout="one.safetensors", **fields):
    """A Hugging Face folder; `fields` override those of config.json, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **dataclasses.asdict(config), **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
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


def write_meta(folder, tensors, config, shards, **fields):
    """A folder like Meta's of tensors that have Hugging Face's names but Meta's order of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"dim": config.hidden_size, "multiple_of": 256, "n_heads": config.num_attention_heads,
               "n_layers": config.num_hidden_layers, "norm_eps": config.rms_norm_eps, "vocab_size": -1,
               "n_kv_heads": config.num_key_value_heads, "rope_theta": config.rope_theta, **fields}
    (folder / "params.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    for shard in range(shards):
        held = {"rope.freqs": torch.ones(config.head_dim // 2)}
        for name, tensor in tensors.items():
            columns = any(part in name for part in ("embed_tokens", "o_proj", "down_proj"))
            split = tensor if tensor.dim() == 1 else tensor.chunk(shards, dim=1 if columns else 0)[shard]
            for hf, meta in META.items():
                name = name.replace(hf, meta) if hf + "." in name else name
            held[name] = split.clone()
        torch.save(held, folder / f"consolidated.{shard:02d}.pth")


def meta_rows(tensors, config):
    """The same model with each head's rotary rows as Meta orders them: channel i beside channel i + K/2."""
    K, ordered = config.head_dim, dict(tensors)
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            heads = range(0, len(tensor), K)
            ordered[name] = tensor[[head + half + i for head in heads for i in range(K // 2) for half in (0, K // 2)]]
    return ordered


def write_checkpoint(folder, model, layout, **fields):
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    if layout.startswith("meta"):
        write_meta(folder, meta_rows(tensors, model.config), model.config, int(layout[4:]), **fields)
    else:
        write_hf(folder, tensors, model.config, layout, **fields)


@given(data=st.data(), seed=seeds, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_every_layout_loads_to_the_same_tensors(tmp_path_factory, data, seed, dtype, layout):
    shards = int(layout[4:]) if layout.startswith("meta") else None
    config = data.draw(configs(kv_heads=shards, tied=st.just(False) if shards else st.booleans()))
    if shards:
        config = dataclasses.replace(config, max_position_embeddings=2048)  # Meta's file says nothing of it
    folder = tmp_path_factory.mktemp("layout")
    model = random_model(config, seed).to(dtype)
    write_checkpoint(folder, model, layout)
    loaded = load_pretrained(folder)
    assert loaded.config == config == read_config(folder)
    expected, actual = model.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    for name in expected:
        assert actual[name].dtype == dtype and torch.equal(actual[name], expected[name]), name
    if config.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in loaded.parameters())


@given(data=st.data(), seed=seeds, shards=st.sampled_from([1, 2, 4]))
def test_metas_weights_give_the_logits_of_metas_interleaved_rotary_formula(tmp_path_factory, data, seed, shards):
    config = data.draw(configs(kv_heads=shards, tied=st.just(False)))
    folder = tmp_path_factory.mktemp("meta")
    tensors = {name: p.detach() for name, p in random_model(config, seed).named_parameters()}
    write_meta(folder, tensors, config, shards)
    tokens = random_tokens(config, 1, 7, seed)
    with torch.no_grad():
        logits = load_pretrained(folder, torch.float64)(tokens)[0]
    assert close(logits, reference_logits(tensors, config, tokens[0].tolist(), interleaved=True))


@given(configs(), seeds, st.sampled_from(DTYPES))
def test_what_is_saved_is_what_loads(tmp_path_factory, config, seed, dtype):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "tokenizer.model").write_text("stays")
    model = random_model(config, seed).to(dtype)
    llama.save_pretrained(model, folder)
    loaded = load_pretrained(folder)
    assert loaded.config == config
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.model"]
    llama.save_pretrained(loaded, folder)  # over the very file its weights are mapped from
    assert torch.equal(load_pretrained(folder).model.norm.weight, model.model.norm.weight)


def test_a_written_config_says_what_was_added_to_it_and_reads_back(tmp_path):
    llama.write_config(SMALL, tmp_path / "new", extra={"quantization": {"bits": 3}})
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization"] == {"bits": 3}
    assert read_config(tmp_path / "new") == SMALL


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_that_is_asked_for_casts_and_mixed_checkpoints_become_one_dtype(tmp_path, dtype):
    model = random_model(SMALL)
    tensors = {name: p.detach().to(torch.float32 if "norm" in name else torch.float16)
               for name, p in model.named_parameters()}
    write_hf(tmp_path, tensors, SMALL)
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.float16}
    loaded = load_pretrained(tmp_path, dtype=dtype)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, tensors[name].to(dtype)), name


def test_one_block_is_filled_alone_from_the_memory_map(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "one.safetensors")
    config, weights = open_weights(tmp_path)
    with torch.device("meta"):
        block = llama.Block(config)
    llama.fill(block, weights, prefix="model.layers.1.")
    for name, p in model.model.layers[1].named_parameters():
        assert torch.equal(block.get_parameter(name), p)


@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_loading_maps_the_files_and_copies_nothing(tmp_path, layout):
    anonymous = lambda: 1024 * int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])
    config = LlamaConfig(2**14, 2**10, 4, 1, 1, 1, tie_word_embeddings=True)  # an embedding of 64 MB
    write_checkpoint(tmp_path, Llama(config), layout)
    before = anonymous()
    model = load_pretrained(tmp_path)
    assert anonymous() - before < 2**23
    assert model.model.embed_tokens.weight.nbytes == 2**26


@pytest.mark.parametrize("fields, attribute, value", [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": ...}, "rope_theta", 500.0),
    ({"rope_scaling": None, "rope_theta": 1e6}, "rope_theta", 1e6),
    ({"rope_theta": ..., "num_key_value_heads": ..., "rms_norm_eps": ...}, "rope_theta", 10000.0),
    ({"num_key_value_heads": None}, "num_key_value_heads", 4),
    ({"quantization": {"bits": 4, "group_size": 32}}, "hidden_size", 16),
    ({"head_dim": 4, "attention_bias": False, "use_cache": True, "pretraining_tp": 2, "torch_dtype": "float16"},
     "head_dim", 4),
])
def test_configs_old_and_new_are_read(tmp_path, fields, attribute, value):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields)
    assert getattr(read_config(tmp_path), attribute) == value


def test_metas_config_has_its_own_defaults(tmp_path):
    model = random_model(dataclasses.replace(SMALL, num_key_value_heads=4))
    write_checkpoint(tmp_path, model, "meta2", n_kv_heads=..., rope_theta=..., norm_eps=..., vocab_size=24)
    config = read_config(tmp_path)
    assert (config.num_key_value_heads, config.rope_theta, config.rms_norm_eps) == (4, 10000.0, 1e-5)
    assert (config.vocab_size, config.intermediate_size) == (24, 12)


def test_metas_file_of_a_known_size_gets_the_context_that_it_does_not_tell(tmp_path, monkeypatch):
    model = random_model(dataclasses.replace(SMALL, num_key_value_heads=4, rms_norm_eps=1e-5))
    write_checkpoint(tmp_path, model, "meta2", vocab_size=-1)
    assert read_config(tmp_path).max_position_embeddings == 2048
    known = dataclasses.replace(model.config, max_position_embeddings=4096)
    monkeypatch.setitem(llama.CONFIGS, "other", dataclasses.replace(known, rms_norm_eps=1e-6, max_position_embeddings=1))
    monkeypatch.setitem(llama.CONFIGS, "known", known)
    assert read_config(tmp_path) == known


@pytest.mark.parametrize("name, value", [
    ("rope_scaling", {"type": "linear", "factor": 2.0}), ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", "linear"), ("rope_scaling", {"factor": 2.0}), ("rope_parameters", {"rope_type": "yarn"}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),  # beside rope_theta 10000
    ("rope_parameters", {"full_attention": {"rope_theta": 5.0}}), ("rope_parameters", {"partial_rotary_factor": 0.5}),
    ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True),
    ("model_type", "mistral"), ("model_type", ...), ("architectures", ["LlamaForSequenceClassification"]),
    ("head_dim", 8), ("sliding_window", 4096), ("partial_rotary_factor", 0.5), ("quantization_config", {"bits": 4}),
    ("auto_map", {"AutoModel": "own.py"}),
    ("vocab_size", ...), ("vocab_size", 24.0), ("hidden_size", None), ("num_hidden_layers", 0), ("hidden_size", True),
    ("hidden_size", 2 ** 40), ("num_hidden_layers", 10 ** 9), ("rms_norm_eps", -1e-5), ("rms_norm_eps", "1e-5"),
    ("rope_theta", float("nan")), ("eos_token_id", [1, 2]),
    ("tie_word_embeddings", "no"),
])
def test_a_config_that_asks_for_another_model_is_refused_by_name(tmp_path, name, value):
    write_checkpoint(tmp_path, random_model(SMALL), "one.safetensors", **{name: value})
    for read in (read_config, open_weights, load_pretrained):
        with pytest.raises(UserError, match=f"config.json: .*{name}"):
            read(tmp_path)


@pytest.mark.parametrize("fields", [{"hidden_size": 18}, {"hidden_size": 12}, {"num_key_value_heads": 3}])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, fields):
    write_checkpoint(tmp_path, random_model(SMALL), "one.safetensors", **fields)
    with pytest.raises(UserError, match="config.json: .*heads"):
        read_config(tmp_path)


@pytest.mark.parametrize("name, value", [("use_scaled_rope", True), ("moe", {"num_experts": 8}), ("lora_args", {})])
def test_a_meta_config_that_asks_for_another_model_is_refused_by_name(tmp_path, name, value):
    write_checkpoint(tmp_path, random_model(SMALL), "meta1", **{name: value})
    with pytest.raises(UserError, match=f"params.json: {name}"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\xff", "[" * 100000])
@pytest.mark.parametrize("name, layout", [("config.json", "one.bin"), ("params.json", "meta2"),
                                          ("model.safetensors.index.json", "many.safetensors")])
def test_broken_json_is_one_error_that_names_the_file(tmp_path, name, layout, content):
    write_checkpoint(tmp_path, random_model(SMALL), layout)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{name}: "):
        load_pretrained(tmp_path)


def test_a_folder_without_a_model_or_with_a_quantized_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither config.json .* nor params.json"):
        load_pretrained(tmp_path / "nothing")
    write_checkpoint(tmp_path, random_model(SMALL), "one.bin", quantization={"bits": 4, "group_size": 32})
    with pytest.raises(UserError, match="quantized"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    write_hf(tmp_path / "b", {"a": torch.ones(1)}, SMALL)
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors or pytorch_model.bin"):
        load_pretrained(tmp_path / "b")


# ------------------------------------------------------------------------------------ checkpoints gone wrong

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


def weight_files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))


@given(data=st.data(), layout=st.sampled_from(LAYOUTS),
       what=st.sampled_from(["missing", "unexpected", "misshapen", "of no dimension", "integer", "nan", "-inf"]))
def test_a_bad_tensor_is_one_error_that_names_file_and_tensor(tmp_path_factory, data, layout, what):
    folder = tmp_path_factory.mktemp("bad")
    model = random_model(dataclasses.replace(SMALL, num_key_value_heads=4))
    write_checkpoint(folder, model, layout)
    path = data.draw(st.sampled_from(weight_files(folder)))
    held = llama.open_file(path)
    sizes = ("rope.freqs", "tok_embeddings.weight", "layers.0.feed_forward.w1.weight")  # see the next test
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
def test_metas_tensors_that_tell_the_models_size_are_checked_against_the_others(tmp_path, name, what):
    write_checkpoint(tmp_path, random_model(SMALL), "meta2")
    rewrite(tmp_path / "consolidated.01.pth", lambda tensors: change(tensors, name, what))
    with pytest.raises(UserError, match="consolidated.0[01].pth: tensor|params.json: intermediate_size"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_a_truncated_file_is_one_error_that_names_it(tmp_path_factory, layout, data):
    folder = tmp_path_factory.mktemp("truncated")
    write_checkpoint(folder, random_model(dataclasses.replace(SMALL, num_key_value_heads=4)), layout)
    path = data.draw(st.sampled_from(weight_files(folder)))
    content = path.read_bytes()
    path.write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=path.name):
        load_pretrained(folder)


@pytest.mark.parametrize("layout", ["one.safetensors", "one.bin", "meta1"])
@given(data=st.data())
def test_a_corrupt_file_is_one_error_or_loads_never_anything_else(tmp_path_factory, layout, data):
    folder = tmp_path_factory.mktemp("corrupt")
    write_checkpoint(folder, random_model(SMALL), layout)
    path, = weight_files(folder)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        near = data.draw(st.sampled_from([len(content), 2000]))  # the beginning holds names, shapes and the pickle
        content[data.draw(st.integers(0, min(near, len(content)) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_pretrained(folder)
    except UserError as e:
        assert "\n" not in str(e)


@pytest.mark.parametrize("layout, missing, named", [
    ("many.bin", "pytorch_model-00002-of-00003.bin", "pytorch_model-00002-of-00003.bin: no such file"),
    ("many.safetensors", "model-00003-of-00003.safetensors", "model-00003-of-00003.safetensors: no such file"),
    ("meta4", "consolidated.02.pth", "consolidated.02.pth: no such file"),
    ("meta4", "consolidated.03.pth", r"consolidated.02.pth: .* is a shard missing"),
    ("meta1", "consolidated.00.pth", "consolidated.00.pth: no such file"),
])
def test_a_missing_file_is_named(tmp_path, layout, missing, named):
    write_checkpoint(tmp_path, random_model(dataclasses.replace(SMALL, num_key_value_heads=4)), layout)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=named):
        load_pretrained(tmp_path)


def test_a_second_download_beside_metas_shards_is_none_of_them(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "meta2")
    (tmp_path / "consolidated.00 (1).pth").write_bytes(b"")
    assert all(map(torch.equal, load_pretrained(tmp_path).parameters(), model.parameters()))


@pytest.mark.parametrize("weight_map, error", [
    (None, "index.json: weight_map"), ({"a": 1}, "index.json: weight_map"),
    ({"a": "../b.bin"}, "index.json: weight_map"), ({"a": "gone.bin"}, "gone.bin: no such file"),
    ({"a": "first.bin"}, "first.bin: tensor a is missing, though pytorch_model.bin.index.json"),
    ({"b": "first.bin", "c": "second.bin"}, "second.bin: tensor b is also in first.bin"),
    ({"b": "first.bin"}, "index.json: tensor model.embed_tokens.weight is missing"),
])
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


@pytest.mark.parametrize("content", [
    Attack(), {"a": Attack()}, [torch.ones(1)], {"a": 1}, {}, {"a": {"b": torch.ones(1)}},
    {"a": torch.ones(3).to_sparse()}])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_anything_but_tensors_is_refused_and_runs_no_code(tmp_path, monkeypatch, content, legacy):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path, random_model(SMALL), "one.bin")
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="pytorch_model.bin: not a file of weights"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_pickle_of_before_pytorch_1_6_is_read(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "one.bin")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    read = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [False, True])
def test_16_bits_are_computed_in_bfloat16_where_a_cpu_multiplies_it(monkeypatch, stored, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    wanted = torch.bfloat16 if native and stored != torch.float32 else torch.float32
    assert llama.compute_dtype(stored, "cpu") == wanted


def test_frequencies_that_old_checkpoints_store_are_passed_over(tmp_path):
    model = random_model(SMALL)
    write_checkpoint(tmp_path, model, "one.bin")
    rewrite(tmp_path / "pytorch_model.bin",
            lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    model = random_model(dataclasses.replace(SMALL, tie_word_embeddings=True))
    write_checkpoint(tmp_path, model, "one.bin")
    path, embedding = tmp_path / "pytorch_model.bin", model.model.embed_tokens.weight.detach()
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, embedding)
    for other in (embedding + 1, embedding.half(), embedding[:1]):
        rewrite(path, lambda tensors: tensors.update({"lm_head.weight": other}))
        with pytest.raises(UserError, match="pytorch_model.bin: tensor lm_head.weight"):
            load_pretrained(tmp_path)


def test_a_tensor_is_read_only_when_its_function_is_called(tmp_path):
    write_checkpoint(tmp_path, random_model(SMALL), "many.safetensors")
    for path in weight_files(tmp_path):
        rewrite(path, lambda tensors: [change(tensors, name, "nan") for name in tensors if "layers.1" in name])
    _, weights = open_weights(tmp_path)
    assert weights["model.layers.0.mlp.up_proj.weight"]().isfinite().all()
    with pytest.raises(UserError, match="tensor model.layers.1.mlp.up_proj.weight has NaN"):
        weights["model.layers.1.mlp.up_proj.weight"]()


def test_metas_config_may_say_more_than_the_sizes(tmp_path):
    """As LLaMA-2-70B's does."""
    write_checkpoint(tmp_path, random_model(SMALL), "meta1", ffn_dim_multiplier=1.3, max_batch_size=32, max_seq_len=64,
                     rope_theta=None)
    assert read_config(tmp_path) == SMALL


@pytest.mark.parametrize("fields, attribute, value", [
    ({"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1}, "bos_token_id", 0),
    ({"architectures": None, "attention_bias": None, "mlp_bias": None}, "hidden_size", 16),
    ({"rope_scaling": {"type": "default"}}, "rope_theta", 10000.0),
    ({"rope_scaling": {"rope_type": "default"}}, "rope_theta", 10000.0)])
def test_more_configs_old_and_new_are_read(tmp_path, fields, attribute, value):
    write_hf(tmp_path, {"a": torch.ones(1)}, SMALL, **fields)
    assert getattr(read_config(tmp_path), attribute) == value


def test_float64_is_read_and_hidden_files_are_no_weights(tmp_path):
    model = random_model(SMALL).double()
    write_checkpoint(tmp_path, model, "one.safetensors")
    (tmp_path / "._model.safetensors").write_bytes(b"macOS")
    assert all(map(torch.equal, load_pretrained(tmp_path).parameters(), model.parameters()))
    assert [f.name for f in llama.weight_files(tmp_path)] == ["model.safetensors"]


def test_a_model_that_was_trained_with_checkpointing_generates():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 3)
    expected = generate(model, tokens, 4)
    model.model.checkpointing = True
    assert torch.equal(generate(model, tokens, 4), expected)
