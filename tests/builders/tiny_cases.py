"""Pictures, requests and margins for attacks on the tiny LLaVA."""

import torch
from PIL import Image

from psa_fast.attacks.pixels import Case
from psa_fast.safety import Request

QUESTION = "what colour is the circle ?"


def noisy(seed, size=12):
    """A picture of random pixels."""
    values = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


CASES = [Case(Request(QUESTION, (noisy(i),)), f"case {i}") for i in range(12)]


def worst_margin(target, case):
    """The largest margin of a case's own picture."""
    asked = target.ask(case.request)
    return target.margins(target.read([asked], asked.pictures.unsqueeze(0).float() / 255)).amax()
