"""Where the packages lie; everything else that is to be said of psa-fast stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["psa_fast", "psa_fast.*"]), "psa_fast.ds_configs", "psa_kernels"],
    package_dir={
        # a source root: a package called `kernels` beside train.py would shadow the one transformers imports
        "psa_kernels": "kernels/psa_kernels",
        # the repository shows them at its top; an installed psa-fast carries them
        "psa_fast.ds_configs": "ds_configs",
    },
)
