"""What is computed in which dtype."""

import pytest
import torch

from cli.machine import compute_dtype


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [False, True])
def test_16_bits_are_computed_in_bfloat16_where_a_cpu_multiplies_it(monkeypatch, stored, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    wanted = torch.bfloat16 if native and stored != torch.float32 else torch.float32
    assert compute_dtype(stored, "cpu") == wanted
