"""psa-fast: a fast implementation of PSA-VLM, progressive concept-bottleneck safety for vision-language models."""

__version__ = "0.1.0"
