"""A LLaVA of a few thousand parameters with a real processor, and a PsaVLM around it."""

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from psa_fast.models import PsaVLM
from psa_fast.safety.policy import Policy
from psa_fast.sandbox.word_level import CHAT_TEMPLATE, build_tokenizer
from psa_fast.taxonomy import RISK_TYPES

WORDS = "what colour is the circle ? red blue green sorry , i cannot help with that . be careful :"


def build_base(folder, seed=0):
    """Save a random tiny LLaVA to `folder`."""
    policy = Policy.load()
    hints = [policy.hint(kind, level) or "" for kind in range(len(RISK_TYPES)) for level in range(4)]
    tokenizer = build_tokenizer([WORDS, *hints])
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=12,
            patch_size=4,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "vision_tower" not in name:
            torch.nn.init.normal_(parameter, std=0.5)  # so that answers depend on image and prompt
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    side = {"height": 12, "width": 12}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


#: an add-on as it was trained before the learned query asked alone and windows were read
OLD = dict(neutral_query=False, query_window=0, reads_text=False)


def build_addon(base, folder, seed=1, **config):
    """Save a random add-on for `base` to `folder`."""
    vlm = LlavaForConditionalGeneration.from_pretrained(base)
    torch.manual_seed(seed)
    model = PsaVLM.build(
        vlm, num_safety_tokens=3, num_head_tokens=2, num_attention_heads=2, projector_depth=1, **config
    )
    model.save_addon(folder)
    return folder


def picture(seed):
    """A 12 x 12 picture of one colour."""
    rng = torch.Generator().manual_seed(seed)
    return Image.new("RGB", (12, 12), tuple(torch.randint(0, 256, (3,), generator=rng).tolist()))
