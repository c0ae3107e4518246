"""A `rollout_func` that keeps an engine at the trainer's weights and answers with its samples.

trainer = GRPOTrainer(model, ..., rollout_func=EngineRollout(dtype="float32"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import InvalidRequest, SpecCounts
from rollout_spec.engine import RolloutEngine
from rollout_spec.integrations.trl.compat import check_version
from rollout_spec.integrations.trl.options import check_trainer, sampling_params


class EngineRollout:
    """TRL's `rollout_func`, on a rollout engine in the trainer's process.

    The engine is made at the first call, before the first step, from the trainer's model. Before each later rollout it
    gets the weights, if the trainer has stepped since; its policy version is the trainer's `global_step`. Equal prompts
    that follow each other, as TRL lays out a group, are sampled as one request, so that they share and draft from each
    other's text.

    Args:
        config: An `EngineConfig` or a mapping with its names. `seed` is the trainer's, plus the rank of the process.
        **options: Single fields of it.

    Raises:
        UnsupportedTrl: No TRL is installed, or another release.
        InvalidRequest: An option is unknown or wrong; in the first call, the trainer asks for what is not served.
    """

    def __init__(self, config: EngineConfig | Mapping[str, Any] | None = None, **options: Any) -> None:
        check_version()
        given = config.to_dict() if isinstance(config, EngineConfig) else dict(config or {})
        if "seed" in options or ("seed" in given and not isinstance(config, EngineConfig)):
            raise InvalidRequest(
                "seed: it is the trainer's, plus the rank of the process; set GRPOConfig.seed"
            )
        self.config = EngineConfig.from_dict({**given, **options})
        self.engine: RolloutEngine | None = None
        self._trainer: Any = None

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """One completion per prompt, under the trainer's current policy.

        Returns:
            `prompt_ids` and `completion_ids`: token ids per prompt, end token included. `logprobs`: natural log of each
            token's probability under the distribution it was drawn from (temperature and cuts applied), as TRL has them
            from vLLM.
        """
        engine = self._engine_at_current_weights(trainer)
        params = sampling_params(trainer)
        prompt_ids = trainer._tokenize_prompts(list(prompts))[0]
        groups = [(list(ids), len(list(same))) for ids, same in groupby(prompt_ids)]
        completions = engine.generate(
            [ids for ids, _ in groups], [replace(params, n=count) for _, count in groups]
        )
        self._log(trainer, sum((c.spec for c in completions), SpecCounts()))
        return {
            "prompt_ids": [c.prompt_token_ids for c in completions],
            "completion_ids": [c.token_ids for c in completions],
            "logprobs": [c.processed_logprobs for c in completions],
        }

    def _engine_at_current_weights(self, trainer: Any) -> RolloutEngine:
        step = trainer.state.global_step
        engine = self.engine if trainer is self._trainer else None
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        version = -1 if engine is None else engine.stats().version
        if engine is None or step < version:  # a new trainer, or a new run of it
            check_trainer(trainer)
            sampling_params(trainer)
            seed = trainer.args.seed + trainer.accelerator.process_index
            self.engine = engine = RolloutEngine.from_model(
                model, replace(self.config, seed=seed), version=step
            )
            self._trainer = trainer
        elif step > version:
            engine.update_weights(model.named_parameters(), version=step)
        return engine

    @staticmethod
    def _log(trainer: Any, spec: SpecCounts) -> None:
        """Speculation of this rollout, in the trainer's log."""
        for name in ("drafted", "accepted", "verify_steps", "plain_steps"):
            trainer._log_metric(f"rollout/spec_{name}", float(getattr(spec, name)))
