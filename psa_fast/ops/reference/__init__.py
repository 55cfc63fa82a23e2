"""What the ops compute: for each op, a function of the same name and arguments in plain torch under autograd.

They are the specification that tests, benchmarks and docs go by: written to be read, neither fast nor sparing with
memory. They compute in the dtype they are given (fp64 where the exact result is wanted), import torch alone and share
no code with the ops. tests/ops/test_reference.py holds them against torch's own modules.
"""

from psa_fast.ops.reference.attention_pool import attention_pool
from psa_fast.ops.reference.concept_loss import concept_loss
from psa_fast.ops.reference.concept_pool import concept_pool
from psa_fast.ops.reference.supervised_linear_cross_entropy import supervised_linear_cross_entropy

__all__ = ["attention_pool", "concept_loss", "concept_pool", "supervised_linear_cross_entropy"]
