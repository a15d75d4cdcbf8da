"""What merge.py promises: a merged model has no adapter and returns the adapted model's bits.

No tolerance for it anywhere: `torch.equal` is the claim. The command is tested in
test_formats_run.py.
"""

import copy

import pytest
import torch
from helpers import same
from helpers_merge import SMALL, quantized_llama, tokens, trained
from hypothesis import given
from hypothesis import strategies as st

from llama import LINEARS, Cache, Llama
from merge import merge
from qalora import LoRALinear, QALoRALinear, add_adapters
from quant import Quantized, QuantLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**32 - 1)

# ---- one layer


def bits_of(y):
    """Bytes to compare: float16 ends at 65504, and beyond it NaN is no equal of NaN."""
    return y.detach().view(torch.uint8)


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([2, 3, 4]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 5),
    SEEDS,
    st.sampled_from([1e-6, 1, 1e4]),
    st.lists(st.integers(1, 5), max_size=2),
    st.booleans(),
)
def test_a_merged_layer_returns_the_same_bits_under_autocast_and_for_inputs_of_any_rank(
    dtype, bits, rows, groups, group_size, rank, seed, size, lead, autocast
):
    """Whatever the adapter holds, however small or large; under autocast too."""
    torch.manual_seed(seed)
    quantized = Quantized(
        torch.randint(2**bits, (rows, groups * group_size), dtype=torch.uint8),
        torch.rand(rows, groups).half(),
        torch.randn(rows, groups),
    )
    base = QuantLinear.from_quantized(quantized, bits)
    layer = QALoRALinear(base, rank, alpha=7)  # 7 / rank is seldom exact
    layer.lora_A.data = size * torch.randn(rank, groups)
    layer.lora_B.data = torch.randn(rows, rank)
    x = torch.randn(*lead, groups * group_size).to(dtype)
    before = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        adapted = layer(x)
        plain = merge(layer)
        assert type(plain) is QuantLinear
        assert same([bits_of(plain(x))], [bits_of(adapted)])
    assert adapted.isfinite().all() or dtype == torch.float16
    assert same(
        [plain.packed, plain.scale, plain.offset],
        [before.base.packed, before.base.scale, before.effective_offset()],
    )
    assert not plain.offset.requires_grad


# ---- a whole model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "bits, group_size, targets",
    [(4, 16, LINEARS), (3, 8, LINEARS), (2, 1, LINEARS), (4, 8, ("q_proj", "down_proj"))],
)
def test_a_merged_model_returns_the_same_bits_token_by_token_with_a_cache_too(
    dtype, bits, group_size, targets
):
    base = quantized_llama(bits, group_size, dtype)
    adapted = trained(add_adapters(copy.deepcopy(base), 4, 16, targets))
    merged = merge(copy.deepcopy(adapted))
    batch = tokens(99, 3, 20)
    assert same([merged(batch)], [adapted(batch)])
    assert not torch.equal(merged(batch), base(batch)), "training changed nothing"
    with torch.inference_mode():
        assert same([merged(batch[:1, :1])], [adapted(batch[:1, :1])])
        for model in (adapted, merged):
            model.cache = Cache(SMALL, 3, 20, dtype, "cpu")
            model(batch[:, :7], model.cache)
        assert same([merged(batch[:, 7:8], merged.cache)], [adapted(batch[:, 7:8], adapted.cache)])

    before, after = base.state_dict(), merged.state_dict()
    assert list(after) == list(before)
    for name in after:  # in the layers that had adapters, offsets moved; all else stayed
        moved = name.endswith(".offset") and name.split(".")[-2] in targets
        assert same([after[name]], [before[name]]) != moved, name
        assert after[name].shape == before[name].shape, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_merges_into_plain_float_layers(dtype):
    """The baseline's merge adds to the weights: outputs are equal up to rounding only."""
    torch.manual_seed(0)
    base = Llama(SMALL).to(dtype)
    adapted = trained(add_adapters(copy.deepcopy(base), 4, 16))
    merged = merge(copy.deepcopy(adapted))
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())

    def described(model):
        return [(name, p.dtype, p.shape) for name, p in model.named_parameters()]

    assert described(merged) == described(base)
    batch = tokens(99, 3, 20)
    change, error = (adapted(batch) - base(batch)).norm(), (merged(batch) - adapted(batch)).norm()
    assert error < change * (1e-4 if dtype == torch.float32 else 0.2), (error, change)
