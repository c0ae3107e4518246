"""The Ray actor that holds an engine and answers verl's requests.

All requests of a server share the engine's batch. Weights, sleep and interruption come as calls of the same actor, and
whatever would block runs in a thread, so that none holds up another.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutMode, TokenOutput

from rollout_spec.contracts import invalid
from rollout_spec.engine import EngineStats, RolloutEngine
from rollout_spec.integrations.verl.compat import NAME
from rollout_spec.integrations.verl.conversions import to_sampling_params, to_token_output
from rollout_spec.integrations.verl.metrics import ServerFigures
from rollout_spec.integrations.verl.options import read_options
from rollout_spec.integrations.verl.spot import IdleTraining
from rollout_spec.integrations.verl.transport import Bucket
from rollout_spec.integrations.verl.weights import WeightStream

logger = logging.getLogger("rollout_spec")


def server_name(replica_rank: int) -> str:
    """Ray's name of a replica's server."""
    return f"{NAME}_server_{replica_rank}_0"


class RolloutServer:
    """One engine behind the methods that verl's replicas and clients call.

    The checkpoint is loaded at start, which finds what does not fit and measures costs; what is sampled from are the
    trainer's weights, and requests wait for the first of them.

    Args:
        config: verl's `RolloutConfig`, as OmegaConf has it.
        model_config: verl's `HFModelConfig`, the same.
        replica_rank: Of this server among all.
        mode: Who shares the device: a trainer (hybrid), another model (colocated), nobody (standalone).

    Raises:
        InvalidRequest: See `options.read_options`.
        UnsupportedModel, WeightError: See `RolloutEngine.from_pretrained`.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int, mode: RolloutMode) -> None:
        rollout, model = omega_conf_to_dataclass(config), omega_conf_to_dataclass(model_config, HFModelConfig)
        self.options = read_options(rollout, model, replica_rank)
        self.mode = mode
        self.engine = RolloutEngine.from_pretrained(self.options.path, self.options.engine)
        spot = self.options.spot_training
        self.idle_training = None if spot is None else IdleTraining(self.engine, spot)
        self.engine.sleep(level=2)
        self.engine.wake_up()
        self._version: int | None = None  # of the weights in force
        self._asleep = self._interrupted = self._rejecting = False
        self._changed = asyncio.Event()
        self._stream: WeightStream | None = None
        self._in_flight = 0
        self._lent = False  # the device, to a trainer

    # --- requests --------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> TokenOutput:
        """Sample one answer; the prompt of a later turn is everything before it, a tool's tokens included.

        verl's ids are random, or one for all, so the noise follows from ids of the engine's own: from the seed, the
        policy version, the prompt, and how often it came. A run that is repeated draws the same samples.

        Raises:
            InvalidRequest: A parameter is unknown or out of range, the prompt does not fit, or it is not text.
        """
        given = {"image_data": image_data, "video_data": video_data, "audio_data": audio_data}
        for name, value in given.items():
            if value:
                raise invalid(name, type(value).__name__, "the models of this backend read text alone")
        prompt = [int(token) for token in prompt_ids]
        params, wants_logprobs = to_sampling_params(sampling_params, len(prompt), self.options)
        self._in_flight += 1  # from here on nothing is trained
        try:
            await self._stop_training()
            while not self._open:
                if self._rejecting:
                    fields = {"global_steps": self._version}
                    return TokenOutput(token_ids=[], stop_reason="aborted", extra_fields=fields)
                await self._changed.wait()
            version = self._version
            assert version is not None, "open without weights"
            (completion,) = await self.engine.generate_async(prompt, params)
        finally:
            self._in_flight -= 1
            self._train_if_idle()
        reported = "logprobs" if self.options.raw_logprobs else "processed_logprobs"
        return TokenOutput(**to_token_output(completion, version, reported if wants_logprobs else None))

    @property
    def _open(self) -> bool:
        return not (self._asleep or self._interrupted or self._version is None)

    def _wake_waiting(self) -> None:
        """Let requests that wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _stop_training(self) -> None:
        """The engine is needed, or its device."""
        if self.idle_training is not None:
            await self.idle_training.need()

    def _train_if_idle(self) -> None:
        busy = self._in_flight or self._lent or self._stream is not None
        if self.idle_training is not None and self._open and not busy:
            self.idle_training.allow()

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """End what is in flight with what it has, and take nothing new before `resume_generation`.

        Args:
            reject_request: Answer new requests with `aborted` instead of letting them wait.
        """
        self._interrupted, self._rejecting = True, reject_request
        self._wake_waiting()
        await self._stop_training()
        before = self.engine.stats().finished
        await asyncio.to_thread(self.engine.abort)
        return {"aborted_count": self.engine.stats().finished - before}

    async def resume_generation(self) -> None:
        self._interrupted = self._rejecting = False
        self._wake_waiting()
        self._train_if_idle()

    # --- memory ----------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Give the device to whoever shares it; a trainer brings new weights before `wake_up`."""
        if self.mode is RolloutMode.STANDALONE:
            return
        self._lent = True
        await self._stop_training()
        if not self.options.free_cache:
            return
        self._asleep = True
        if self.idle_training is not None:
            await self.idle_training.release()
        level = 2 if self.mode is RolloutMode.HYBRID else 1
        if level == 2:
            self._version = None
        await asyncio.to_thread(self.engine.sleep, level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory back; of verl's two tags, `weights` needs nothing: they come with their memory."""
        if tags is None or "kv_cache" in tags:
            await asyncio.to_thread(self.engine.wake_up)
            self._asleep = self._lent = False
            self._wake_waiting()
            self._train_if_idle()

    async def release_kv_cache(self) -> None:
        """Make room for a weight update; requests were interrupted before."""
        if self.options.free_cache:
            await asyncio.to_thread(self.engine.sleep)

    async def resume_kv_cache(self) -> None:
        await asyncio.to_thread(self.engine.wake_up)

    async def clear_kv_cache(self) -> None:
        """Nothing to do: what old weights computed goes with them."""

    # --- weights ---------------------------------------------------------------------------------------

    async def begin_update(self, version: int) -> bool:
        """Start an update; False if that version is in force already, and nothing need be sent."""
        if version == self._version:
            return False
        await self._stop_training()
        self._stream = WeightStream(self.engine, version)
        return True

    async def take(self, bucket: Bucket) -> None:
        """Weights of the update that was started."""
        assert self._stream is not None, "no update was started"
        await self._stream.feed(bucket)

    async def finish_update(self, version: int) -> None:
        assert self._stream is not None, "no update was started"
        report = await self._stream.finish()
        self._stream, self._version = None, version
        self._lent = self._lent and self.options.free_cache  # else nobody says that it is given back
        self._wake_waiting()
        self._train_if_idle()
        logger.info("policy version %d: %d tensors in %.2f s", version, report.tensors, report.seconds)

    async def cancel_update(self, reason: str) -> None:
        assert self._stream is not None, "no update was started"
        await self._stream.cancel(reason)
        self._stream = None
        self._train_if_idle()

    # --- looking inside --------------------------------------------------------------------------------

    async def stats(self) -> EngineStats:
        """The engine's own figures."""
        return self.engine.stats()

    async def rollout_spec_figures(self) -> ServerFigures:
        """What the metrics need of this server."""
        stats = self.engine.stats()
        return ServerFigures(
            stats.spec.drafted,
            stats.spec.accepted,
            stats.generated_tokens,
            bool(stats.reports),
            stats.last_update.seconds,
            stats.canary_acceptance,
            *(
                ()
                if self.idle_training is None
                else (
                    self.idle_training.idle_seconds,
                    self.idle_training.used_seconds,
                    self.idle_training.version,
                )
            ),
        )

    async def start_profile(self, **options: Any) -> None:
        """verl's profilers do not reach into this process."""

    async def stop_profile(self, **options: Any) -> None:
        """verl's profilers do not reach into this process."""


def current_node_and_devices(worker: Any) -> tuple[str, str]:
    """Node id and device numbers of the worker this runs in (Ray's `__ray_call__`)."""
    from verl.utils.device import get_resource_name

    context = ray.get_runtime_context()
    return context.get_node_id(), ",".join(context.get_accelerator_ids()[get_resource_name()])
