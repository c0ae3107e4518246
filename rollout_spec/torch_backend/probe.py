"""Row-invariance probe: do a token's logits depend on how many rows are computed with it?"""

from __future__ import annotations

import numpy as np
import torch

from rollout_spec.torch_backend.kv_cache import BlockPool
from rollout_spec.torch_backend.runner import Runner

_TOKENS = 100
_SPLITS = ((1,) * 12, (2, 3, 4), (5, 9), (33, 67))


@torch.inference_mode()
def row_invariance(runner: Runner, pool: BlockPool, max_model_len: int) -> bool:
    """Score one random sequence in one pass and in passes of other sizes; True if every logit is bitwise equal.

    Needs about 130 tokens' worth of target compute, and as many tokens of free KV blocks (less on a smaller
    cache). A False costs nothing but the choice of the coupled verifier; True holds for this model, device,
    dtype and number of threads.
    """
    block_size = runner.cache.block_size
    count = min(_TOKENS, pool.available * block_size, max_model_len)
    blocks = pool.allocate(-(-count // block_size))
    try:
        tokens = np.random.default_rng(0).integers(0, runner.target.spec.vocab_size, count)
        whole = runner.score(runner.target, tokens, blocks)
        for split in _SPLITS:
            start = 0
            for rows in split:
                if start >= count:
                    break
                stop = min(count, start + rows)
                part = runner.score(runner.target, tokens[:stop], blocks, start)
                if not torch.equal(part, whole[start:stop]):
                    return False
                start = stop
    finally:
        pool.free(blocks)
    return True
