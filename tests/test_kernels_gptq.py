"""kernels/gptq.py: the best of many ranges is found, however many are tried at once."""

import pytest
import torch

import kernels.gptq


def trials_of_one_group(bits, trials=7, inputs=16, outputs=33):
    """(x_gO, importance_g, trials_T2O, cut, least, errors [T + 1, O] by a loop in float64)."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.rand(inputs, outputs, generator=generator)
    importance = torch.rand(inputs, generator=generator)
    tried = 0.4 * torch.rand(trials, 2, outputs, generator=generator)
    cut = torch.rand(2, outputs, generator=generator)
    errors = []
    for below, above in tried.double():
        step = (1 - below - above) / (2**bits - 1)
        codes = ((x - below) / step).round().clamp(0, 2**bits - 1)
        errors.append((importance.unsqueeze(1) * (x - below - step * codes).square()).sum(dim=0))
    errors = torch.stack(errors)
    least = (1.01 * errors.amin(dim=0).median()).float().expand(outputs)  # half do better
    return x, importance, tried, cut, least, torch.cat((least.double().unsqueeze(0), errors))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("floats", [1, 16 * 33 * 3, 2**20])
def test_the_best_trial_is_found_one_three_or_all_at_a_time(bits, floats, monkeypatch):
    monkeypatch.setattr(kernels.gptq, "IN_CACHE", floats)
    x, importance, tried, cut, least, errors = trials_of_one_group(bits)
    found, error = kernels.gptq.best_trial(x, importance, tried, bits, cut, least)
    expected, best = errors.min(dim=0)
    assert torch.allclose(error.double(), expected, rtol=1e-4, atol=1e-7)
    assert 10 < (best > 0).sum() < 23, best
    all_cuts = torch.cat((cut.unsqueeze(0), tried))
    assert torch.equal(found, all_cuts[best, :, torch.arange(33)].t())


def test_of_equal_trials_the_first_is_taken():
    x, importance, tried, cut, least, _ = trials_of_one_group(4)
    once, _ = kernels.gptq.best_trial(x, importance, tried, 4, cut, least)
    found, error = kernels.gptq.best_trial(x, importance, 0 * tried, 4, cut, once[0] + torch.inf)
    kept, same = kernels.gptq.best_trial(x, importance, 0 * tried, 4, cut, error)
    assert not found.any() and torch.equal(kept, cut) and torch.equal(same, error)
