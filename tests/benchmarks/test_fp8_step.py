"""Frozen layers in FP8: products against exact ones of the same quantized numbers, and what is refused."""

import json

import fp8_step
import pytest
import torch
from ladder import CUDA, DEVICE
from torch import nn


def test_products_and_gradient_are_those_of_the_quantized_numbers():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    layer = fp8_step.Fp8Linear(linear)
    x = torch.randn(3, 5, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    assert out.shape == (3, 5, 48)
    assert out.dtype == torch.bfloat16
    grad = torch.randn_like(out)
    out.backward(grad)

    def exact(values, dtype):
        stored, scale = fp8_step.quantize(values, dtype)
        return stored.double() * scale.double()

    weight = exact(linear.weight, torch.float8_e4m3fn)
    expected = exact(x.detach(), torch.float8_e4m3fn) @ weight.t()
    # bf16 is what is left of the exact sum
    torch.testing.assert_close(out.double(), expected, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), exact(grad, torch.float8_e5m2) @ weight, rtol=2**-7, atol=1e-3)
    # and the quantized numbers are near the others
    error = (out.double() - x.detach().double() @ linear.weight.double().t()).norm() / expected.norm()
    assert 0.001 < error < 0.06


def test_the_largest_number_does_not_overflow():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        stored, scale = fp8_step.quantize(torch.tensor([-3e4, 0.0, 3e4]), dtype)
        torch.testing.assert_close(stored.float() * scale, torch.tensor([-3e4, 0.0, 3e4]))
        stored, scale = fp8_step.quantize(torch.zeros(4), dtype)
        assert torch.equal(stored.float() * scale, torch.zeros(4))


def test_only_frozen_layers_that_fit_are_replaced():
    trained, odd, fits = nn.Linear(16, 16, bias=False), nn.Linear(16, 20, bias=False), nn.Linear(32, 16, bias=False)
    biased = nn.Linear(16, 16)
    model = nn.ModuleDict({"trained": trained, "odd": odd, "fits": fits, "biased": biased})
    for name in ("odd", "fits", "biased"):
        model[name].requires_grad_(False)
    assert fp8_step.in_fp8(model) == 1
    assert isinstance(model["fits"], fp8_step.Fp8Linear)
    assert model["trained"] is trained


def test_both_stages_train_and_a_loss_that_is_off_ends_the_run(tmp_path, monkeypatch):
    path = tmp_path / "fp8.json"
    fp8_step.main(["--size", "tiny", "--steps", "4", "--json", str(path)])
    stages = json.loads(path.read_text())["stages"]
    layers = 7 * fp8_step.SIZES["tiny"].layers
    assert {stage: found["layers"] for stage, found in stages.items()} == {"1": layers, "2": layers}
    for found in stages.values():
        assert 0 < found["largest_difference"] <= fp8_step.TOLERANCE
    monkeypatch.setattr(fp8_step, "TOLERANCE", stages["1"]["largest_difference"] / 2)
    with pytest.raises(SystemExit, match=r"stage 1: a loss in FP8 is .* off"):
        fp8_step.main(["--size", "tiny", "--steps", "4", "--stages", "1"])


@pytest.mark.skipif(CUDA, reason="there is a device")
def test_a_cpu_is_refused_with_a_sentence(capsys):
    with pytest.raises(SystemExit):
        fp8_step.main(["--size", "7b"])
    assert "FP8 needs a CUDA device of compute capability 8.9 or more, and there is none" in capsys.readouterr().err


def test_an_older_gpu_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(fp8_step, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert fp8_step.refusal("7b") == "FP8 needs compute capability 8.9 or more, NVIDIA A100 has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert fp8_step.refusal("7b") is None
