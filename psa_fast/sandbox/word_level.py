"""The sandbox's language as tokens: a word-level tokenizer, a LLaVA chat template and a stock LlavaProcessor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from psa_fast.sandbox.world import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

PATCH = 16
# positions of the language model: what a few thousand words around a request take
MAX_LENGTH = 4096
SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
# LLaVA-1.5's own wording. A message's content is a string or a list of parts, as processors accept both.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{- ' ASSISTANT: ' -}}{%- else -%}{{- ' USER: ' -}}{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer whose vocabulary is the words and punctuation marks of `texts`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Lowercase()
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = {
        word
        for text in (*texts, "USER: ASSISTANT: .,:?!")
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
    }
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizer  # type: ignore[assignment]
    # only its clean-up is of use here: no blank before a punctuation mark
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def build_processor(texts: Iterable[str]) -> LlavaProcessor:
    """The processor of the sandbox base: 96x96 pixels in -1..1, 36 patch tokens an image, the CLS token dropped."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(texts),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
