"""A Hugging Face causal language model on this machine as the model of a judge: text only, greedy, one at a time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from psa_fast.evaluation.judges.contract import NoReply, Prompt, Reply


class LocalModel:
    """Loads the model at once, from safetensors only, on a GPU if there is one.

    Raises ValueError if `path` holds no such model.
    """

    workers = 1

    def __init__(self, path: str | Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from psa_fast.safety.load import default_dtype

        self.model = str(path)
        if not Path(path).is_dir():  # nothing is fetched
            raise ValueError(f"--judge_local {path} is no folder with a model")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=default_dtype())
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--judge_local {path}: no causal language model ({error})") from error
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        files = sorted(file for file in Path(path).glob("*") if file.is_file())
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self._state = hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def digest(self, prompt: Prompt) -> str:
        """Sizes and times of the model's files: another model under the same name is another judge."""
        return self._state

    def __call__(self, prompt: Prompt) -> Reply:
        """The reply. Raises NoReply if the prompt is longer than the model's positions."""
        import torch

        if prompt.pictures or prompt.top_logprobs:
            raise ValueError("a local judge reads text only and gives no log-probabilities; use --judge_url")
        if prompt.text is not None:
            ids = self._tokenizer(prompt.text)["input_ids"]
        elif self._tokenizer.chat_template is None:
            raise ValueError(f"--judge_local {self.model}: its tokenizer has no chat template")
        else:
            messages = [dict(message) for message in prompt.messages]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if longest is not None and len(ids) + prompt.max_tokens > longest:
            raise NoReply(f"the prompt has {len(ids)} tokens, the model {longest} positions")
        given = torch.tensor([ids], device=self._model.device)
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=prompt.max_tokens,
                do_sample=False,
            )
        return Reply(self._tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
