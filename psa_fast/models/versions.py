"""One check that the installed packages can serve both stages, made before either begins."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from psa_fast.files import shorten

#: lowest versions that the tests passed with, as pyproject.toml requires them
LOWEST = {"torch": "2.13", "transformers": "5.20", "peft": "0.18", "deepspeed": "0.19.8"}
#: a set of versions that is known to work
TESTED = {"transformers": "5.23.0", "peft": "0.21.2"}


def check_versions() -> None:
    """Refuse packages that would fail in either stage, stage 2 included, whichever is about to begin.

    Only PEFT's own interface is used, so transformers' wish for a newer PEFT in its wrapper does not count. What no
    table of versions can foresee is tried: LoRA on one linear layer.

    Raises:
        ValueError: one sentence with the package, what is installed and the command that mends it.
    """
    check_installed(*LOWEST)
    _try_lora()


def check_installed(*packages: str) -> None:
    """Refuse packages of LOWEST that are absent or too old. Raises ValueError as `check_versions`."""
    for package in packages:
        lowest = LOWEST[package]
        try:
            installed = version(package)
        except PackageNotFoundError:
            raise ValueError(f"{package} is not installed: pip install '{package}>={lowest}'") from None
        if Version(installed) < Version(lowest):
            raise ValueError(
                f"psa-fast needs {package} {lowest} or newer, {installed} is installed: "
                f"pip install '{package}>={lowest}'"
            )


def _try_lora() -> None:
    try:
        import torch
        from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
        from torch import nn

        with torch.random.fork_rng(devices=[]):  # a check must not change what a run draws
            model = inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
        found = sorted(get_peft_model_state_dict(model, save_embedding_layers=False))
    except Exception as error:  # whatever two packages that do not fit together raise
        problem = f" ({shorten(f'{type(error).__name__}: {error}')})"
    else:
        if found == ["0.lora_A.weight", "0.lora_B.weight"]:
            return
        problem = ""
    pair = " and ".join(f"{package} {version(package)}" for package in TESTED)
    remedy = " ".join(f"{package}=={tested}" for package, tested in TESTED.items())
    raise ValueError(f"stage 2's LoRA does not work with {pair}{problem}: pip install {remedy}")
