"""Our step with the language model's frozen linear layers in FP8, beside the same step in bf16.

    python benchmarks/fp8_step.py [--size 7b] [--steps 100] [--json FILE]

Forward and data gradient of every frozen matrix are `torch._scaled_mm`: weights in e4m3, quantized once, activations in
e4m3 and gradients in e5m2, quantized each time, one scale a tensor. A frozen matrix has no gradient of its own; LM
head, LoRA and safety modules stay as they are. Both steps start from the same weights and see the same batches; a loss
of the FP8 step that is more than 1% off in any of them ends the run with an error. Weights are random, so that is a
check of the arithmetic and says nothing of a trained model's answers.

It needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell). --size tiny runs anywhere and times nothing
worth knowing. Not yet measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_step import our_form
from ladder import CUDA, where
from step_forms import Form, Ours
from step_measure import CLOCKS, add_shared_options, check_shared_options, peak_memory, time_steps
from step_model import SIZES, TIMED, build_base
from step_rows import Rows, in_order
from torch import Tensor, nn

#: the largest relative difference of any loss
TOLERANCE = 0.01
WARMUP, BATCH = 5, 2
#: different rows; steps go over them again and again
ROWS = 40
CAPABILITY = (8, 9)
TARGETS = {1: "stage1_joint", 2: "stage2_lora"}


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x over its scale in `dtype`, and the scale (fp32, a scalar): the largest element becomes the largest number."""
    largest = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / largest).clamp_min(1e-12)
    return (x.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale


class _Product(torch.autograd.Function):
    """x [N, in] with a frozen weight [out, in]; only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(transposed, scale)
        rows, by = quantize(x, torch.float8_e4m3fn)
        return torch._scaled_mm(rows, weight.t(), scale_a=by, scale_b=scale, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        transposed, scale = ctx.saved_tensors
        rows, by = quantize(grad, torch.float8_e5m2)
        return torch._scaled_mm(rows, transposed.t(), scale_a=by, scale_b=scale, out_dtype=grad.dtype), None, None, None


class Fp8Linear(nn.Module):
    """A frozen nn.Linear without bias whose products are in FP8. [..., in] -> [..., out], in the input's dtype.

    The weight lies twice, as the second factor of either product must be column by column: as many bytes as in bf16.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize(linear.weight.detach(), torch.float8_e4m3fn)
        self.register_buffer("weight", weight)
        self.register_buffer("transposed", weight.t().contiguous())
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = _Product.apply(x.reshape(-1, self.in_features), self.weight, self.transposed, self.scale)
        return rows.view(*x.shape[:-1], self.out_features)


def in_fp8(language: nn.Module) -> int:
    """Replace every frozen linear layer that FP8 products can take (no bias, sides of 16s); returns how many."""
    count = 0
    for module in list(language.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear) or child.weight.requires_grad or child.bias is not None:
                continue
            if child.in_features % 16 == 0 and child.out_features % 16 == 0:
                setattr(module, name, Fp8Linear(child))
                count += 1
    return count


def refusal(size: str) -> str | None:
    """Why FP8 products are of no use here, or None."""
    if size == "tiny":
        return None
    needed = ".".join(map(str, CAPABILITY))
    if not CUDA:
        return f"FP8 needs a CUDA device of compute capability {needed} or more, and there is none"
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        device = torch.cuda.get_device_name()
        return f"FP8 needs compute capability {needed} or more, {device} has {'.'.join(map(str, found))}"
    return None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both steps; returns what --json writes."""
    args = _options(argv)
    size, base = SIZES[args.size], build_base(SIZES[args.size])
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), base, size, min(ROWS, BATCH * (WARMUP + args.steps)), args.seed)
    result: dict[str, Any] = {**where(), "size": args.size, "steps": args.steps, "stages": {}}
    for stage in args.stages:
        # dropout draws would differ: the comparison is of the products
        plain, fp8 = (our_form(base, size, TARGETS[stage], dropout=0.0) for _ in range(2))
        layers = in_fp8(fp8.psa.family.module(fp8.psa.vlm, "language"))
        found = _beside(plain, fp8, rows, args)
        result["stages"][str(stage)] = {"layers": layers, **found}
        print(
            f"stage {stage}: {layers} layers in FP8, losses differ by at most {found['largest_difference']:.2%}, "
            f"step {found['fp8']['p50_ms']:.0f} ms, in {result['dtype']} {found['plain']['p50_ms']:.0f} ms"
        )
        if not found["largest_difference"] <= TOLERANCE:
            raise SystemExit(f"stage {stage}: a loss in FP8 is {found['largest_difference']:.2%} off, more than 1%")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _beside(plain: Ours, fp8: Ours, rows: Rows, args: argparse.Namespace) -> dict[str, Any]:
    """Times, memory and the largest relative difference of any loss of two forms, step by step."""
    losses: dict[str, list[dict[str, Tensor]]] = {"plain": [], "fp8": []}
    forms: dict[str, Form] = {"plain": plain, "fp8": fp8}
    for name, form in forms.items():
        _keep(form, losses[name])
    order = in_order(len(rows.lengths), BATCH)
    order = [order[i % len(order)] for i in range(WARMUP + args.steps)]
    batches = [plain.batch([rows[plain.safety_tokens][i] for i in numbers]) for numbers in order]
    times = time_steps(forms, {name: batches for name in forms}, WARMUP, CLOCKS[args.clock])
    pairs = zip(losses["plain"], losses["fp8"], strict=True)
    worst = max(abs(b[name].item() / a[name].item() - 1) for a, b in pairs for name in a)
    found: dict[str, Any] = {"largest_difference": worst}
    for name, form in forms.items():
        memory = peak_memory(form, batches[0])
        found[name] = {"p50_ms": 1e3 * statistics.median(times[name]), "step_mb": memory["step_mb"]}
        found[name]["last_loss"] = {key: loss.item() for key, loss in losses[name][-1].items()}
    return found


def _keep(form: Any, kept: list) -> None:
    step = form.step

    def keeping(batch: Any) -> Any:
        kept.append(step(batch))
        return kept[-1]

    form.step = keeping


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TIMED, default="7b")
    parser.add_argument("--stages", type=int, nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--steps", type=int, default=100, help=f"measured steps, after {WARMUP}")
    add_shared_options(parser)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected 1 or more")
    if sentence := refusal(args.size):
        parser.error(sentence)
    check_shared_options(parser, args)
    return args


if __name__ == "__main__":
    main()
