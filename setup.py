"""Packaging of psa-fast."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "psa_fast/__init__.py").read_text()).group(1)

setup(
    name="psa-fast",
    version=VERSION,
    description="Fast PSA-VLM: progressive concept-bottleneck safety for vision-language models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["psa_fast", "psa_fast.*"]), "psa_kernels"],
    # a source root: a package called `kernels` beside train.py would shadow the one transformers imports
    package_dir={"psa_kernels": "kernels/psa_kernels"},
    package_data={"psa_fast": ["**/*.yaml", "py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.23",
        "huggingface_hub",
        "deepspeed>=0.19.3",
        "ninja",
        "peft>=0.18",
        "safetensors",
        "pillow",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "scikit-learn",
        "tensorboard",
    ],
    extras_require={
        "gpu": ["flash-attn", "liger-kernel"],
        "bench": ["matplotlib"],
        "test": ["pytest", "pytest-benchmark", "pytest-timeout", "ruff", "mypy", "liger-kernel"],
    },
    entry_points={"console_scripts": ["psa-fast=psa_fast.cli:main"]},
)
