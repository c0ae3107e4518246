"""What a drafter is trained on: sequences that the policy sampled, with what the target computed along them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def _no_positions() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Episode:
    """One sequence, prompt and response, with the features of one policy version.

    Attributes:
        request_id: Whose it is.
        tokens: int64 [T].
        features: [T, F] or [T - 1, F], in the target's dtype: its features at each position, as
            `EagleSpec.feature_layers` names them. The last token, which no pass has read, may have none.
        prompt_tokens: How many of the tokens are the prompt.
        version: The policy version that computed the features and sampled the response, or its end: where an update
            interrupted it, an older one sampled what came before.
        rejected: int64, ascending: positions of `tokens` at which verification rejected a draft; what stands there is
            what the target drew instead.
    """

    request_id: str
    tokens: Tensor
    features: Tensor
    prompt_tokens: int
    version: int
    rejected: Tensor = field(default_factory=_no_positions)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.tokens.nbytes + self.features.nbytes + self.rejected.nbytes
