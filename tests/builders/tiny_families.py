"""Tiny random VLMs of every family with their processors: nothing is downloaded."""

from types import SimpleNamespace

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from psa_fast.models import get_family

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                "<|video_pad|>"]  # fmt: skip


def byte_tokenizer(special, template, **named):
    """A fast tokenizer of single bytes."""
    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def qwen_tokenizer():
    return byte_tokenizer(QWEN_SPECIAL, QWEN_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def text_sizes(tokenizer, tied, **more):
    return dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=tied, **more,
    )  # fmt: skip


def qwen_text(tokenizer, tied, **more):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    return text_sizes(tokenizer, tied, rope_parameters=rope, **more)


def qwen_ids(tokenizer):
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen2_vl(tokenizer, tied=False):
    vision = dict(depth=3, embed_dim=16, hidden_size=32, mlp_ratio=2, num_heads=2, patch_size=4, spatial_merge_size=2)
    text = qwen_text(tokenizer, tied)
    config = Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **qwen_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(tokenizer, tied=False):
    vision = dict(
        depth=3, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4,
        window_size=16, fullatt_block_indexes=[1], spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    text = qwen_text(tokenizer, tied)
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **qwen_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(tokenizer, tied=False):
    vision = dict(
        depth=3, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=2, deepstack_visual_indexes=[0, 1], num_position_embeddings=16,
    )  # fmt: skip
    text = qwen_text(tokenizer, tied, head_dim=8)
    config = Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **qwen_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config)


def qwen_images():
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024)


INTERNVL_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")


def internvl_tokenizer():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    named = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    around = {"start_image_token": "<img>", "end_image_token": "</img>"}
    return byte_tokenizer(special, INTERNVL_TEMPLATE, extra_special_tokens=around, **named)


def internvl(tokenizer, tied=False):
    vision = InternVLVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**text_sizes(tokenizer, tied)), tie_word_embeddings=tied,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


def internvl_images():
    return GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4)


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_IMAGE = {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>",
               "image_token_index": "<image_soft_token>"}  # fmt: skip


def gemma3_tokenizer():
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *GEMMA_IMAGE.values()]
    return byte_tokenizer(special, GEMMA_TEMPLATE, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


def gemma3(tokenizer, tied=False):
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    text = Gemma3TextConfig(
        **text_sizes(tokenizer, tied), head_dim=8, query_pre_attn_scalar=8, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA_IMAGE.items()}
    config = Gemma3Config(
        vision_config=vision, text_config=text, tie_word_embeddings=tied, mm_tokens_per_image=4, **ids
    )
    return Gemma3ForConditionalGeneration(config)


def gemma3_images():
    return Gemma3ImageProcessorPil(size={"height": 16, "width": 16})


IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% if m['content'] is string %} {{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def idefics3_tokenizer():
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    special = ["<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>", *tiles]
    named = dict(eos_token="<end_of_utterance>", pad_token="<|im_end|>")
    return byte_tokenizer([*special, "<end_of_utterance>"], IDEFICS_TEMPLATE, **named)


def idefics3(tokenizer, tied=False, of=(Idefics3Config, Idefics3ForConditionalGeneration)):
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = of[0](
        vision_config=vision, text_config=LlamaConfig(**text_sizes(tokenizer, tied)), tie_word_embeddings=tied,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return of[1](config)


def smolvlm(tokenizer, tied=False):
    return idefics3(tokenizer, tied, (SmolVLMConfig, SmolVLMForConditionalGeneration))


def idefics3_images(of=Idefics3ImageProcessorPil):
    return of(size={"longest_edge": 48}, max_image_size={"longest_edge": 16})


def smolvlm_images():
    return idefics3_images(SmolVLMImageProcessorPil)


LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def llava_tokenizer():
    return byte_tokenizer(["<image>", "<pad>", "</s>"], LLAVA_TEMPLATE, eos_token="</s>", pad_token="<pad>")


def llava(tokenizer, tied=False):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=tied,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=tied,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def llava_images():
    side = {"height": 16, "width": 16}
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)


#: model_type -> model, tokenizer, image processor
FAMILIES = {
    "llava": (llava, llava_tokenizer, llava_images),
    "qwen2_vl": (qwen2_vl, qwen_tokenizer, qwen_images),
    "qwen2_5_vl": (qwen2_5_vl, qwen_tokenizer, qwen_images),
    "qwen3_vl": (qwen3_vl, qwen_tokenizer, qwen_images),
    "internvl": (internvl, internvl_tokenizer, internvl_images),
    "gemma3": (gemma3, gemma3_tokenizer, gemma3_images),
    "idefics3": (idefics3, idefics3_tokenizer, idefics3_images),
    "smolvlm": (smolvlm, idefics3_tokenizer, smolvlm_images),
}


def scaled(vlm, seed=0):
    """Weights large enough that attention matters, and nothing zero."""
    torch.manual_seed(seed)
    for parameter in vlm.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim > 1:
            parameter.data.mul_(4)
    vlm.generation_config.eos_token_id = None
    return vlm.eval()


def build(family, dtype=torch.float64, tied=False):
    """A model of the family and its tokenizer."""
    make, tokenizer, _ = FAMILIES[family]
    torch.manual_seed(0)
    tokens = tokenizer()
    return scaled(make(tokens, tied).to(dtype)), tokens


def build_folder(family, folder):
    """Save a tiny base of the family with its processor's parts."""
    vlm, tokenizer = build(family, torch.float32)
    vlm.generation_config.eos_token_id = tokenizer.eos_token_id
    vlm.generation_config.pad_token_id = tokenizer.pad_token_id
    vlm.save_pretrained(folder)
    images = FAMILIES[family][2]()
    if family == "llava":
        LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=LLAVA_TEMPLATE).save_pretrained(
            folder
        )
    else:
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
    return folder


def build_processor(family, vlm, tokenizer, safety_tokens):
    """The processor of a model that `build` made."""
    images = FAMILIES[family][2]()
    if family == "llava":
        whole = LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=LLAVA_TEMPLATE)
    else:
        whole = SimpleNamespace(image_processor=images, tokenizer=tokenizer)
    return get_family(vlm).extend_processor(whole, safety_tokens)


def picture(width, height, seed=0):
    """A picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def drawn(rows, columns, cell):
    """A picture of cells that become lighter row by row."""
    values = torch.arange(rows * columns, dtype=torch.uint8).reshape(rows, columns) * 15
    return Image.fromarray(values.repeat_interleave(cell, 0).repeat_interleave(cell, 1).numpy()).convert("RGB")
