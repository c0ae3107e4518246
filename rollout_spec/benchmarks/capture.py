"""What keeping the target's features costs while decoding: the same rollouts with and without, in turns.

One engine does both, for two engines' weights lie in different places, which alone can make a few percent.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rollout_spec.adaptive.buffer import EpisodeBuffer
from rollout_spec.adaptive.capture import FeatureCapture
from rollout_spec.benchmarks.bootstrap import median_interval
from rollout_spec.benchmarks.paired import paired
from rollout_spec.contracts import SamplingParams
from rollout_spec.engine import RolloutEngine
from rollout_spec.example_policy import load_problems

BATCHES = (1, 8, 32)
_TOKENS = {1: 192, 8: 128, 32: 64}  # of every answer, so that all sequences are live all the time
_BUDGET_BYTES = 64 << 20


class CaptureCost:
    """Plain decoding of `batch` sequences; with capture every finished one goes into a buffer.

    Args:
        path: The policy.
        pairs: Per batch size.
        seed: Of prompts and noise.
        console: For progress.
        dtype: Of the engine.

    Attributes:
        ratios: By batch size: time with capture over time without.
    """

    def __init__(self, path: Path, pairs: int, seed: int, console: Console, dtype: str = "auto") -> None:
        self.pairs, self.console = pairs, console
        options: dict[str, Any] = {
            "dtype": dtype, "seed": seed, "max_model_len": 320, "max_num_seqs": max(BATCHES),
            "graph_bytes": 0,  # a CUDA graph would keep features, or not, for good
            "speculation": {"drafter": "none", "history": False, "verifier": "coupled"},
        }  # fmt: skip
        self._engine = RolloutEngine.from_pretrained(path, options)
        self.buffer = EpisodeBuffer(_BUDGET_BYTES)
        layers = self._engine.backend.spec.num_layers
        self.layers = (min(2, layers // 2), layers // 2, layers)
        self._capture = FeatureCapture(self._engine, self.buffer.add, self.layers)
        self._features, self._finished = (
            self._engine.backend.runner.features,
            self._engine.backend.on_finished,
        )
        self._prompts = load_problems().prompts(max(BATCHES), seed, "test")
        self.ratios: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Every batch size."""
        for batch in BATCHES:
            params = SamplingParams(max_tokens=_TOKENS[batch], ignore_eos=True)
            ids = [f"{batch}-{row}" for row in range(batch)]
            before = self._capture.captured

            def run(capture: bool, params: SamplingParams = params, ids: list[str] = ids) -> None:
                backend = self._engine.backend
                backend.runner.features = self._features if capture else None
                backend.on_finished = self._finished if capture else None
                self._engine.generate(list(self._prompts[: len(ids)]), params, request_ids=ids)

            found = paired(partial(run, True), partial(run, False), self.pairs)
            assert self._capture.captured - before == batch * (self.pairs + 1), "a sequence was not captured"
            low, high = median_interval(found.ratios)
            self.ratios[f"B={batch}"] = {
                "capture_over_plain": round(statistics.median(found.ratios), 4),
                "interval_95": [round(low, 4), round(high, 4)],
                "pairs": self.pairs,
                "seconds_plain": round(found.candidate_seconds, 4),
                "tokens": batch * _TOKENS[batch],
            }
            self.console.print(f"B={batch}: {found.median:.4f} ({low:.4f}-{high:.4f})", highlight=False)
