"""Public differentiable ops: exact, in plain torch. Importing this package needs torch alone. See docs/ops.md.

`psa_fast.ops.reference` has the specification of each under the same name.
"""

from psa_fast.ops.attention_pool import attention_pool
from psa_fast.ops.concept_loss import ConceptLoss, concept_loss
from psa_fast.ops.concept_pool import ConceptPool, concept_pool
from psa_fast.ops.supervised_linear_cross_entropy import supervised_linear_cross_entropy

__all__ = [
    "ConceptLoss",
    "ConceptPool",
    "attention_pool",
    "concept_loss",
    "concept_pool",
    "supervised_linear_cross_entropy",
]
