"""What of lmms_eval 0.7.3 the model `psa` stands on, in little: its base class, messages, manifest and requests."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel


class ChatTextContent(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ChatMediaContent(BaseModel):
    type: Literal["image", "video", "audio"]
    url: Any


class ChatMessage(BaseModel):
    role: Literal["user", "system", "assistant"]
    content: list[ChatTextContent | ChatMediaContent]


class ChatMessages(BaseModel):
    messages: list[ChatMessage]


class CacheHook:
    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.kept.append((attr, req, res))


class lmms:
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    """`args` of a chat task: context, messages of a row, generation_kwargs, number, task, split."""

    args: tuple[Any, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def install(monkeypatch) -> None:
    """Put the modules in the place of those of the package."""
    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, members in parts.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "psa_fast.evaluation.lmms_eval_model", raising=False)
