"""What vLLM's statistics say of an engine, kept for `EngineStats`."""

from __future__ import annotations

from typing import Any


class Watch:
    """Listens as one of vLLM's stat loggers.

    Attributes:
        running: Requests being decoded.
        kv_usage: Share of the KV cache in use.
        generated: Tokens sampled.
        preemptions, drafts, drafted, accepted: Totals: requests sent back, verifications, draft tokens proposed, accepted.
    """

    def __init__(self) -> None:
        self.running = self.generated = 0
        self.preemptions = self.drafts = self.drafted = self.accepted = 0
        self.kv_usage = 0.0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        """A factory as vLLM takes it."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        watch = self

        class Listener(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, *others: Any, **options: Any
            ) -> None:
                watch.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Listener(vllm_config, engine_index)

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """One step's statistics."""
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs
            self.generated += iteration_stats.num_generation_tokens
        if scheduler_stats is None:
            return
        self.running, self.kv_usage = scheduler_stats.num_running_reqs, scheduler_stats.kv_cache_usage
        counted = scheduler_stats.spec_decoding_stats
        if counted is not None:
            self.drafts += counted.num_drafts
            self.drafted += counted.num_draft_tokens
            self.accepted += counted.num_accepted_tokens
