"""An LM head whose forward can also return the loss, so that the loss runs where ZeRO-3 has the head's weight."""

from __future__ import annotations

from torch import Tensor, nn

from psa_fast.ops import supervised_linear_cross_entropy


class SupervisedLMHead(nn.Linear):
    """nn.Linear; with labels it returns the cross-entropy of the supervised rows instead of logits."""

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        num_items: float | Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """hidden [..., E] -> logits [..., V]; with labels [...] (aligned with hidden) -> scalar loss."""
        if labels is None:
            return super().forward(hidden)
        return supervised_linear_cross_entropy(
            hidden, self.weight, labels, bias=self.bias, num_items=num_items, token_weights=token_weights
        )


def supervise(head: nn.Module) -> SupervisedLMHead:
    """Give a plain nn.Linear its second forward in place: same object, same parameters, same state_dict keys."""
    if isinstance(head, SupervisedLMHead):
        return head
    if type(head) is not nn.Linear:
        raise ValueError(f"the LM head is a {type(head).__name__}, expected a plain nn.Linear")
    head.__class__ = SupervisedLMHead
    return head  # type: ignore[return-value]
