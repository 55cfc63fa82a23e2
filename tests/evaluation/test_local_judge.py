"""A judging model on this machine: the prompt as its template has it, the likeliest tokens as the reply."""

import pytest
import torch
from builders.judging import result
from builders.tiny_llava import WORDS
from transformers import LlamaConfig, LlamaForCausalLM

from psa_fast.evaluation.judged import answered
from psa_fast.evaluation.judges.contract import NoReply, Prompt
from psa_fast.evaluation.judges.known import get_format
from psa_fast.evaluation.judges.local_model import LocalModel
from psa_fast.evaluation.judges.model_judge import ModelJudge
from psa_fast.evaluation.judges.reply_cache import ReplyCache
from psa_fast.sandbox.word_level import build_tokenizer

ASK = "{% if add_generation_prompt %}what{% endif %}"
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}" + ASK


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    tokenizer = build_tokenizer([WORDS])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=None, **sizes)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def greedy(folder, text, count):
    """The likeliest tokens after a text, one forward pass each."""
    tokenizer = build_tokenizer([WORDS])
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[-count:], skip_special_tokens=True)


def test_the_reply_is_what_the_model_goes_on_with(folder, tmp_path):
    model = LocalModel(folder)
    prompt = Prompt(({"role": "what", "content": "red circle ?"},), max_tokens=5)
    assert model(prompt).text == greedy(folder, "what : red circle ? what", 5)
    with ReplyCache(tmp_path / "r.jsonl").open() as cache:
        judge = ModelJudge(get_format("llama_guard_3"), model, cache)
        [opinion] = judge.judge([answered(result(0, "risk", "red"), "guarded")])
    assert opinion.verdict == "unparsed"  # words of a random model
    with pytest.raises(NoReply, match="64 positions"):
        model(Prompt(({"role": "what", "content": "red " * 70},)))
    with pytest.raises(ValueError, match="reads text only"):
        model(Prompt(prompt.messages, pictures=("a.png",)))
    before = model.digest(prompt)
    (folder / "config.json").touch()
    assert LocalModel(folder).digest(prompt) != before


def test_a_model_without_a_template_is_named(folder):
    model = LocalModel(folder)
    model._tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        model(Prompt(({"role": "user", "content": "red"},)))
