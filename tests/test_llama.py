"""What llama.py promises: the LLaMA of the papers, its cache, and generation."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors
import torch
from helpers import (
    DTYPES,
    SEEDS,
    SMALL,
    close,
    configs,
    exact_model,
    random_model,
    random_tokens,
    reference_frequencies,
    reference_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import formats
import llama
from llama import (
    CONFIGS,
    Cache,
    Llama,
    LlamaConfig,
    choose,
    generate,
    load_pretrained,
    rotary_table,
    scale_frequencies,
)

# ---- the model


@given(configs(), SEEDS, st.integers(1, 9))
def test_logits_are_those_of_the_formulas_in_float64(config, seed, length):
    model, tokens = exact_model(config, seed), random_tokens(config, 2, length, seed)
    logits = model(tokens).detach()
    for row in range(2):
        expected = reference_logits(model.state_dict(), config, tokens[row].tolist())
        assert close(logits[row], expected)


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

    def listen(token_B):
        seen.append(token_B.item())

    tokens = generate(model, torch.tensor([[1]]), 60, on_token=listen)
    assert "".join(pieces[t] for t in seen).startswith(
        " Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high"
    )
    assert tokens[0].tolist() == [1, *seen]


def test_parameters_bear_the_names_of_hugging_face_checkpoints_and_nothing_else_is_stored(material):
    with safetensors.safe_open(material("stories260K") / "model.safetensors", "pt") as file:
        names = set(file.keys())
    model = Llama(formats.read_config(material("stories260K")))
    assert set(model.state_dict()) == names
    assert not list(model.buffers()), "a buffer would be cast by .to(dtype)"


@pytest.mark.parametrize(
    "name, count",
    [
        ("tiny", 332_480),
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("33b", 32_528_943_616),
        ("65b", 65_285_660_672),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
    ],
)
def test_the_named_sizes_have_the_published_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(CONFIGS[name]).parameters()) == count


def test_heads_have_the_size_that_the_width_gives_them_or_one_of_their_own():
    assert LlamaConfig(24, 16, 12, 2, 4, 2).head_dim == 4
    wide = Llama(LlamaConfig(24, 16, 12, 2, 4, 2, head_dim=6)).model.layers[0].self_attn
    shapes = [tuple(getattr(wide, f"{name}_proj").weight.shape) for name in "qkvo"]
    assert shapes == [(24, 16), (12, 16), (12, 16), (16, 24)]
    with pytest.raises(AssertionError, match="head_dim=5"):
        LlamaConfig(24, 16, 12, 2, 4, 2, head_dim=5)


@given(configs())
def test_the_rotary_table_is_position_times_scaled_frequency(config):
    positions = torch.tensor([0, 1, 5, 63, 200])  # beyond the context, and the original one
    cos, sin = rotary_table(config, positions)
    angles = np.outer(positions.numpy(), reference_frequencies(config))
    assert cos.dtype == sin.dtype == torch.float32
    assert np.abs(cos.numpy() - np.cos(angles)).max() < 1e-4  # float32 angles of up to 200
    assert np.abs(sin.numpy() - np.sin(angles)).max() < 1e-4


@given(configs().filter(lambda config: config.rope_scaling))
def test_scaled_frequencies_are_those_of_the_formulas_in_float64(config):
    unscaled = dataclasses.replace(config, rope_scaling=None)
    frequencies = torch.tensor(reference_frequencies(unscaled))
    scaled = scale_frequencies(frequencies, config.rope_scaling)
    assert np.allclose(scaled, reference_frequencies(config), rtol=1e-12, atol=0)


def test_llama_3s_scaling_keeps_fast_pairs_divides_slow_ones_and_blends_between():
    config = CONFIGS["llama3.2-1b"]
    unscaled = dataclasses.replace(config, rope_scaling=None)
    ratio = reference_frequencies(unscaled) / reference_frequencies(config)
    frequencies = torch.tensor(reference_frequencies(unscaled))
    found = (frequencies / scale_frequencies(frequencies, config.rope_scaling)).numpy()
    assert np.allclose(found, ratio, rtol=1e-12)
    assert (found == 1).sum() == 15 and np.isclose(found, 32).sum() == 14 and len(found) == 32


@given(configs(), SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_decoding_with_the_cache_in_any_portions_equals_the_full_forward_pass(
    config, seed, portions
):
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


@given(configs(), SEEDS, st.integers(1, 8), st.integers(1, 5))
def test_padding_on_the_right_is_invisible(config, seed, length, padding):
    model, tokens = exact_model(config, seed), random_tokens(config, 2, length, seed)
    padded = F.pad(tokens, (0, padding), value=config.vocab_size - 1)
    with torch.no_grad():
        assert close(model(padded)[:, :length], model(tokens), 1e-9)


@given(configs(), SEEDS, st.integers(1, 8))
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
        # with the same, rounded weights but never rounded rotary angles
        rounded = model.to(torch.float32)(tokens)
    assert low.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert close(low, rounded, tolerance)


def test_norm_statistics_of_half_precision_are_taken_in_float32():
    x = torch.full((4,), 300.0, dtype=torch.float16)  # its square is no float16 number
    assert torch.equal(llama.RMSNorm(4, 1e-6).half()(x), torch.ones(4, dtype=torch.float16))


@given(configs(), SEEDS)
def test_checkpointing_changes_neither_loss_nor_gradients(config, seed):
    model, tokens = random_model(config, seed), random_tokens(config, 2, 6, seed)
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.model.checkpointing = checkpointing
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_keeps_fewer_bytes_for_the_backward_pass():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 8)
    kept = []
    for model.model.checkpointing in (False, True):
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(tokens)
    assert kept[1] < kept[0] / 2, kept


# ---- generation


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
@given(configs(), SEEDS, st.integers(1, 4), st.integers(0, 6), st.integers(0, 5))
def test_greedy_generation_is_the_argmax_of_full_passes_and_stops_at_eos(
    config, seed, length, count, end
):
    model, tokens = exact_model(config, seed), random_tokens(config, 3, length, seed)
    free = greedy_without_cache(model, tokens, count, eos=None)
    assert torch.equal(generate(model, tokens, count), free)
    eos = free[0, min(length + end, free.shape[1] - 1)].item()  # does come, sooner or later
    columns = []
    stopped = generate(model, tokens, count, eos_token_ids=[eos], on_token=columns.append)
    assert torch.equal(stopped, greedy_without_cache(model, tokens, count, eos))
    assert [c.tolist() for c in columns] == stopped[:, length:].T.tolist()


@settings(max_examples=25)
@given(configs(), SEEDS, st.integers(1, 5))
def test_a_row_ends_at_any_of_several_tokens_and_repeats_it(config, seed, count):
    model, tokens = exact_model(config, seed), random_tokens(config, 3, 2, seed)
    free = generate(model, tokens, count).tolist()
    stops = {free[0][2], free[1][-1]}  # a first and a last token that do come
    expected, longest = [], 0
    for row in free:
        end = next((i for i in range(2, len(row)) if row[i] in stops), None)
        expected.append(row if end is None else row[: end + 1] + row[end : end + 1] * len(row))
        longest = max(longest, len(row) if end is None else end + 1)
    stopped = generate(model, tokens, count, eos_token_ids=sorted(stops))
    assert stopped.tolist() == [row[:longest] for row in expected]


@given(SEEDS, st.floats(0.3, 3), st.floats(0.05, 1))
def test_sampling_draws_from_the_smallest_set_of_likeliest_tokens_that_reaches_top_p(
    seed, temperature, top_p
):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
    p = (logits / temperature).exp().numpy()
    p /= p.sum()
    kept, mass = np.zeros(8), 0.0
    for token in sorted(range(8), key=lambda token: -p[token]):
        if mass >= top_p - 1e-6:  # with less to go, rounding decides: either set will do
            break
        kept[token], mass = p[token], mass + p[token]
    draws = choose(logits.expand(4000, 8), temperature, top_p, torch.Generator().manual_seed(seed))
    share = np.bincount(draws.numpy(), minlength=8) / 4000
    difference = np.abs(share - kept / kept.sum()).max()
    assert difference < 0.05  # six standard deviations of a draw's share


def test_sampling_repeats_with_its_seed_and_a_vanishing_temperature_is_greedy():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 3)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, tokens, 20, temperature=1.0, generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(generate(model, tokens, 20, temperature=1e-37), generate(model, tokens, 20))
    logits = torch.tensor([[400.0, 500.0]])  # 500 / 1e-37 would be infinite
    assert choose(logits, 1e-37, 1.0).item() == 1


def test_a_model_that_was_trained_with_checkpointing_generates():
    model, tokens = random_model(SMALL), random_tokens(SMALL, 2, 3)
    expected = generate(model, tokens, 4)
    model.model.checkpointing = True
    assert torch.equal(generate(model, tokens, 4), expected)
