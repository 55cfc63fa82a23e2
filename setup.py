"""Packaging of psa-fast. The ranges are those whose ends `make test-oldest` and `make test-newest` have run."""

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
    packages=[*find_packages(include=["psa_fast", "psa_fast.*"]), "psa_fast.ds_configs", "psa_kernels"],
    package_dir={
        # a source root: a package called `kernels` beside train.py would shadow the one transformers imports
        "psa_kernels": "kernels/psa_kernels",
        # the repository shows them at its top; an installed psa-fast carries them
        "psa_fast.ds_configs": "ds_configs",
    },
    package_data={"psa_fast": ["**/*.yaml", "py.typed"], "psa_fast.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.13,<2.15",
        "triton>=3.7,<3.10; platform_system == 'Linux'",
        "transformers>=5.20,<5.25",
        "tokenizers>=0.23.1",
        "huggingface_hub>=1.31",
        "deepspeed>=0.19.8,<0.20",
        "ninja>=1.11",
        "peft>=0.18,<0.22",
        "safetensors>=0.8",
        "pillow>=11",
        "numpy>=2.0",
        "pydantic>=2.8,<3",
        "pyyaml>=6.0",
        "rich>=13.7",
        "tqdm>=4.66",
        "packaging>=24.0",
        "tensorboard>=2.18",
    ],
    extras_require={
        "gpu": ["flash-attn", "liger-kernel"],
        "bench": ["matplotlib"],
        "test": [
            "pytest>=8.2",
            "pytest-benchmark>=5.0",
            "pytest-timeout>=2.3",
            "ruff>=0.15",
            "mypy>=1.18",
            "scikit-learn>=1.5",
            "liger-kernel>=0.6",
        ],
    },
    entry_points={"console_scripts": ["psa-fast=psa_fast.cli:main"]},
)
