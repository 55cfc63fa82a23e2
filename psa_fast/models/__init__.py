"""The concept bottleneck and PsaVLM, composed around a stock Hugging Face vision-language model."""

# ruff: noqa: E402
from psa_fast.models.versions import check_installed

# the imports below fail with a traceback where these are too old
check_installed("torch", "transformers")

from psa_fast.models.base_model import commit_of, load_base
from psa_fast.models.bottleneck import ConceptBottleneck
from psa_fast.models.concept_attention import ConceptAttention, ConceptReadout
from psa_fast.models.families import Family, ImageFeatures, get_family
from psa_fast.models.lora import add_lora
from psa_fast.models.processor import load_processor
from psa_fast.models.projector import SafetyProjector
from psa_fast.models.psa import PsaOutput, PsaVLM
from psa_fast.models.psa_config import PsaConfig
from psa_fast.models.tokens import SafetyTokens

__all__ = [
    "ConceptAttention",
    "ConceptBottleneck",
    "ConceptReadout",
    "Family",
    "ImageFeatures",
    "PsaConfig",
    "PsaOutput",
    "PsaVLM",
    "SafetyProjector",
    "SafetyTokens",
    "add_lora",
    "commit_of",
    "get_family",
    "load_base",
    "load_processor",
]
