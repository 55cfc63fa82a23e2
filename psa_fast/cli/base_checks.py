"""What must hold of a base for psa-fast to be right on it, measured on the base itself with pictures of noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psa_fast.data import Turn, collate, encode, pack
from psa_fast.data.chat import counts_by_size, prepare_images
from psa_fast.models import PsaVLM, commit_of, load_base, load_processor
from psa_fast.models.base_model import check_base, read_base_config
from psa_fast.models.batch import read_batch_inputs
from psa_fast.models.packing import SDPA_BY_SAMPLE
from psa_fast.safety.load import naming_base

#: largest difference of logits, as a share of their standard deviation, that rounding may make
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_SAFETY_TOKENS = 3
_NEW_TOKENS = 5
_SIZES = (((200, 120),), ((90, 330), (224, 224)), ())


class Check(NamedTuple):
    """One check's name, whether it holds, and what was found."""

    name: str
    good: bool
    found: str


def check_base_model(name: str | Path, dtype: torch.dtype, device: torch.device) -> tuple[str, list[Check]]:
    """Load a base and run every check on it; its model type and the checks, a failed one among them too.

    Raises:
        ValueError: there is no such base, its files are damaged, or its model type is not supported.
    """
    with naming_base(str(name)):
        check_base(name)
        read_base_config(name)  # before the weights
        vlm: Any = load_base(name, dtype, SDPA_BY_SAMPLE)  # of padded rows it is transformers' SDPA
    vlm = vlm.to(device).eval().requires_grad_(False)
    subject = _Subject(vlm, lambda tokens: _processor(name, tokens, commit_of(vlm)))
    found = [_run(title, check) for title, check in subject.checks()]
    return subject.psa(0).family.config.model_type, found


def _processor(name: str | Path, safety_tokens: int, revision: str | None) -> Any:
    config: Any = SimpleNamespace(num_safety_tokens=safety_tokens)
    return load_processor(name, config, revision)


def _run(title: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(title, *check())
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        # a base that is new to us fails in ways of its own: the table says how
        return Check(title, False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")


class _Subject:
    """A base under test. The checks run in order; `vlm` is left as it was."""

    def __init__(self, vlm: Any, processor: Callable[[int], Any]) -> None:
        self.vlm, self.processor = vlm, processor
        weight = next(vlm.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.tolerance = TOLERANCE[self.dtype]

    def checks(self) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
        """Title and check, each of which says whether it holds and what was found."""
        yield "logits without safety tokens are the stock model's", self.stock_logits
        yield "left padding gives what right padding gives", self.padding
        yield "every safety token gets a gradient", self.gradients
        yield "a packed row gives what its samples give", self.packed
        yield "cached answers are those of a loop without a cache", self.generation
        yield "an image's tokens are known from its size", self.counts

    def psa(self, safety_tokens: int) -> PsaVLM:
        """A new add-on on the base."""
        torch.manual_seed(0)
        width = self.vlm.config.get_text_config().hidden_size
        heads = next(n for n in (8, 4, 2, 1) if width % n == 0)
        return PsaVLM.build(
            self.vlm, num_safety_tokens=safety_tokens, num_head_tokens=2, num_attention_heads=heads, projector_depth=1
        )

    def rows(self, safety_tokens: int, answered: bool = True) -> list[Any]:
        """Conversations with one, two and no images."""
        processor, found = self.processor(safety_tokens), []
        for number, sizes in enumerate(_SIZES):
            images = [_noise(*size, seed=number + place) for place, size in enumerate(sizes)]
            turns = [Turn("user", "<image>" * len(images) + "What do you see? " * (number + 1))]
            turns += [Turn("assistant", "A red circle. " * (number + 1))] if answered else []
            found.append(encode(turns, processor, images=images, add_generation_prompt=not answered))
        return found

    def batch(self, rows: list[Any], layout: str) -> dict[str, Any]:
        """One batch on the device: "left" or "right" padded, or "packed"."""
        tokenizer = self.processor(0).tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        made = pack(rows) if layout == "packed" else collate(rows, pad, layout)  # type: ignore[arg-type]
        images = made["pixel_values"]
        return {
            **{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in made.items() if k != "where"},
            "pixel_values": None if images is None else images.to(self.device, self.dtype),
        }

    def states(self, psa: PsaVLM, batch: dict[str, Any]) -> Tensor:
        """Last hidden states [B, T, E] with pictures and safety tokens in place."""
        mask, lengths = batch.get("attention_mask"), batch.get("lengths")
        positions = batch.get("position_ids")
        read = read_batch_inputs(
            psa, batch["input_ids"], mask, lengths, batch["pixel_values"], None, batch["image_counts"], positions
        )
        rows, kwargs = read.rows, {}
        if read.packing is not None:
            kwargs = read.packing.attention_kwargs()
            rows = rows if rows.position_ids is not None else rows._replace(position_ids=read.packing.position_ids)
        elif rows.position_ids is None and mask is not None:
            rows = rows._replace(position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        projected = psa.family.project(self.vlm, read.features)
        return psa.family.states(self.vlm, rows, psa.safety_tokens, projected, any(read.counts), **kwargs)

    def logits(self, psa: PsaVLM, batch: dict[str, Any]) -> Tensor:
        """[B, T, V]."""
        return psa.family.module(self.vlm, "lm_head")(self.states(psa, batch))

    def compared(self, ours: Tensor, theirs: Tensor) -> tuple[bool, str]:
        """Whether two sets of logits are equal but for rounding."""
        share = ((ours - theirs).abs().max() / theirs.std()).item()
        return share <= self.tolerance, f"{share:.1e} of their spread, at most {self.tolerance:g}"

    @torch.no_grad()
    def stock_logits(self) -> tuple[bool, str]:
        """Against the model's own forward from pixels."""
        batch = self.batch(self.rows(0), "right")
        real = batch["attention_mask"].bool()
        images, ids = batch["pixel_values"], batch["input_ids"]
        given = {"pixel_values": images} if isinstance(images, Tensor) else dict(images.tensors)
        if "mm_token_type_ids" in inspect.signature(self.vlm.forward).parameters:
            given["mm_token_type_ids"] = (ids == self.vlm.config.image_token_id).int()
        given |= self.psa(0).family.token_types(ids, 0)
        stock = self.vlm(input_ids=ids, attention_mask=batch["attention_mask"], **given).logits
        return self.compared(self.logits(self.psa(0), batch)[real], stock[real])

    @torch.no_grad()
    def padding(self) -> tuple[bool, str]:
        """Both sides, with safety tokens."""
        psa, rows, found = self.psa(_SAFETY_TOKENS), self.rows(_SAFETY_TOKENS), []
        for side in ("left", "right"):
            batch = self.batch(rows, side)
            found.append(self.logits(psa, batch)[batch["attention_mask"].bool()])
        return self.compared(*found)

    def gradients(self) -> tuple[bool, str]:
        """Of the answer's loss."""
        psa = self.psa(_SAFETY_TOKENS)
        loss = psa(**self.batch(self.rows(_SAFETY_TOKENS), "right")).loss_lm
        assert loss is not None
        (gradient,) = torch.autograd.grad(loss, [psa.safety_tokens.weight])
        least = gradient.float().norm(dim=1).min().item()
        return least > 0, f"the smallest is {least:.1e}"

    @torch.no_grad()
    def packed(self) -> tuple[bool, str]:
        """With the attention that training takes for packed rows."""
        psa, rows = self.psa(_SAFETY_TOKENS), self.rows(_SAFETY_TOKENS)
        psa.family.require("packing")
        padded = self.batch(rows, "right")
        single = self.logits(psa, padded)[padded["attention_mask"].bool()]
        return self.compared(self.logits(psa, self.batch(rows, "packed"))[0], single)

    @torch.no_grad()
    def generation(self) -> tuple[bool, str]:
        """Greedy; a tie that rounding decides otherwise is no fault."""
        psa, rows = self.psa(_SAFETY_TOKENS), self.rows(_SAFETY_TOKENS, answered=False)
        batch = self.batch(rows, "left")
        features = psa.encode_images(batch["pixel_values"])
        new = psa.generate(
            batch["input_ids"], batch["attention_mask"], features, batch["image_counts"],
            max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, suppress_tokens=[psa.family.image_token_id],
        )  # fmt: skip
        grown = dict(batch)
        grown.pop("position_ids", None)
        for step in range(_NEW_TOKENS):
            logits = self.logits(psa, grown)[:, -1]
            logits[:, _suppressed(self.vlm, psa.family.image_token_id)] = -torch.inf
            best, chosen = logits.amax(-1), logits.gather(1, new[:, step : step + 1])[:, 0]
            if bool((best - chosen > self.tolerance * logits[logits.isfinite()].std()).any()):
                return False, f"another token at place {step + 1}"
            grown["input_ids"] = torch.cat([grown["input_ids"], new[:, step : step + 1]], 1)
            grown["attention_mask"] = torch.cat([grown["attention_mask"], torch.ones_like(new[:, :1])], 1)
        return True, f"{_NEW_TOKENS} tokens of {len(rows)} prompts"

    def counts(self) -> tuple[bool, str]:
        """Sizes from tiny to wide."""
        processor = self.processor(_SAFETY_TOKENS)
        sizes = [(30, 30), (64, 64), (500, 40), (40, 500), (1024, 768)]
        images = [_noise(*size) for size in sizes]
        if not counts_by_size(processor):
            same = len(set(prepare_images(images, processor).placeholders)) == 1
            return same, "all images have as many tokens" if same else "images differ in their tokens"
        counted, made = [processor.count(size) for size in sizes], processor.prepare(images).tokens
        return counted == made, f"{counted}" if counted == made else f"{counted} from sizes, {made} from pixels"


def _suppressed(vlm: Any, image_token_id: int) -> list[int]:
    """Ids that `generation` never writes: a placeholder would stand for an image, and an end would be the last."""
    ends = vlm.generation_config.eos_token_id
    return [image_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]


def _noise(width: int, height: int, seed: int = 0) -> Any:
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
