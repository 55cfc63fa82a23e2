"""The frozen vision tower outside ZeRO-3's partitions."""

from __future__ import annotations

from torch import nn

from psa_fast.compat.deepspeed import gathered, is_partitioned
from psa_fast.models import PsaVLM


def keep_whole(model: PsaVLM) -> None:
    """Give every rank all of a frozen, partitioned tower, so that no step gathers it. A collective, before the engine.

    DeepSpeed partitions whatever it finds among a model's submodules, so the tower is one no longer: it stays an
    attribute at its place, but `parameters()`, `state_dict()`, `train()` and `to()` of the model do not reach it.
    A tower that is not partitioned (ZeRO-0 to 2) or that is trained stays as it is.
    """
    tower = model.family.module(model.vlm, "vision")
    parameters = list(tower.parameters())
    if not any(is_partitioned(p) for p in parameters) or any(p.requires_grad for p in parameters):
        return
    with gathered(parameters):
        for module in tower.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    place, _, name = model.family.module_names["vision"].rpartition(".")
    owner = model.vlm.get_submodule(place)
    delattr(owner, name)
    object.__setattr__(owner, name, tower)
