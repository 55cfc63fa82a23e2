"""Taxonomies: classes of risk and their levels. PSA-VLM's, which is the default, by its names; others as files."""

from psa_fast.taxonomy.psa_types import CLEAN, IGNORE_INDEX, PSA, RISK_LEVELS, RISK_TYPES, level_id, type_id

__all__ = ["CLEAN", "IGNORE_INDEX", "PSA", "RISK_LEVELS", "RISK_TYPES", "level_id", "type_id"]
