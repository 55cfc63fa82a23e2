"""Public differentiable ops: exact, in plain torch. Importing this package needs torch alone. See docs/ops.md."""

from psa_fast.ops.absorbed_attention import absorbed_attention
from psa_fast.ops.concept_loss import ConceptLoss, concept_loss
from psa_fast.ops.supervised_cross_entropy import supervised_linear_cross_entropy

__all__ = ["ConceptLoss", "absorbed_attention", "concept_loss", "supervised_linear_cross_entropy"]
