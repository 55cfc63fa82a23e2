"""Tiny random VLMs from configs: nothing is downloaded."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

VOCAB, IMAGE_ID, PAD = 99, 98, 0


def make_vlm(hidden=40, heads=5, tied=False, tower="clip", layer=-2, strategy="default", dtype=torch.float32, layers=2):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    vision = CLIPVisionConfig(**sizes) if tower == "clip" else SiglipVisionConfig(**sizes)
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    vlm = LlavaForConditionalGeneration(config).to(dtype).eval()
    vlm.generation_config.eos_token_id = None  # random models would stop at random
    return vlm


SMALL = dict(num_head_tokens=6, num_attention_heads=5, projector_hidden_size=28, projector_depth=2)


def make_batch(num_safety_tokens, counts=(1, 2, 0), dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    image = [IMAGE_ID] * (num_safety_tokens + 16)
    rows, labels, query = [], [], []
    for i, count in enumerate(counts):
        text = torch.randint(3, 98, (5 + i,), generator=g).tolist()
        answer = [*torch.randint(3, 98, (3 + i,), generator=g).tolist(), 2]
        prompt = [1, *(image * count), *text]
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
        query.append([t != IMAGE_ID for t in prompt] + [False] * len(answer))
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([r + [PAD] * (width - len(r)) for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
        "labels": torch.tensor([r + [-100] * (width - len(r)) for r in labels]),
        "query_mask": torch.tensor([r + [False] * (width - len(r)) for r in query]),
        "pixel_values": torch.randn(sum(counts), 3, 16, 16, generator=g).to(dtype) if sum(counts) else None,
        "image_counts": torch.tensor(counts),
        "safe_type": torch.tensor([1, 6, 2][: len(counts)]),
        "safe_level": torch.tensor([3, 0, 1][: len(counts)]),
        # what the words of a risk say by themselves is not known
        "words_type": torch.tensor([-100, 6, 2][: len(counts)]),
        "words_level": torch.tensor([-100, 0, 1][: len(counts)]),
    }
