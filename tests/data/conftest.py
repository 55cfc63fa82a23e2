"""A tiny processor with a real tokenizer and a real chat template, made without any download."""

from types import SimpleNamespace

import pytest

LLAVA_TEMPLATE = (  # llava-hf/llava-1.5-7b-hf, as published: images first, no EOS, a blank after every text
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_TEMPLATE = (  # order kept, a default system turn, answers closed by a token of their own and a newline
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_TEMPLATE = (  # BOS written by the template, EOS behind a blank
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"llava": LLAVA_TEMPLATE, "chatml": CHATML_TEMPLATE, "llama2": LLAMA2_TEMPLATE}
TEXTS = [
    "USER: what is this shape and what is its colour ? ASSISTANT: a red square . system user assistant be kind",
    "compare the left and the right one , please . they differ : blue dog , green cat . [INST] [/INST]",
    "caution ! the image may be risky . sorry , I can not help with that .",
]


def build_tokenizer(kind, eos, template):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    elif kind == "bytes":  # GPT-2, Qwen, Llama-3
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:  # "pieces": SentencePiece, as Llama-2 and Vicuna
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if template != "chatml":  # the tokenizer puts BOS, as Llama's does
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=eos,
        extra_special_tokens={"image_token": "<image>"},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def build_processor(template="llava", kind="words", eos=None, n_safety=3):
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    eos = eos or ("<|im_end|>" if template == "chatml" else "</s>")
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=build_tokenizer(kind, eos, template),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=n_safety + 1,  # + CLS, which the strategy takes off again
        chat_template=TEMPLATES[template],
    )


@pytest.fixture(scope="session")
def chat():
    """`chat.build(template, kind, eos)`: processors, and the number of placeholders of one of their images."""
    return SimpleNamespace(build=build_processor, per_image=3 + 4)
