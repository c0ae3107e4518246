"""A pool of rollout engines: one call in, all completions out, whichever engines are lost on the way.

A lost engine is replaced, and what it had not finished is sampled again under the same ids. Noise is keyed by seed, id,
index, policy version and position, so a sample becomes the trajectory that it would have been.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from torch import Tensor

from rollout_spec.config import EngineConfig
from rollout_spec.contracts import (
    Completion,
    RolloutSpecError,
    SamplingParams,
    SpecCounts,
    WeightError,
    invalid,
)
from rollout_spec.engine import EngineStats, RolloutEngine
from rollout_spec.integrations.ray.dispatch import (
    LOSSES,
    Group,
    Lengths,
    PoolError,
    Request,
    group_siblings,
    place,
)
from rollout_spec.models.checkpoint import read_config
from rollout_spec.models.spec import ModelSpec
from rollout_spec.requests import Prompt, RequestReader
from rollout_spec.sampling.noise import fold

LOST = (RayActorError, ObjectLostError)
GONE = (*LOST, PoolError)  # or silent


class EngineActor:
    """What runs in each process: an engine, starting from the pool's last update if there has been one."""

    def __init__(
        self, path: str, config: dict, first: int, weights: dict[str, Tensor] | None, now: int
    ) -> None:
        self.engine = RolloutEngine.from_pretrained(path, config, version=first)
        if weights is not None:
            self.update_weights(weights, now)

    async def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Each request's completions; groups that are in flight together share the engine's batch."""
        generate = self.engine.generate_async
        calls = [generate(r.prompt, r.params, request_id=r.request_id) for r in requests]
        return list(await asyncio.gather(*calls))

    def update_weights(self, weights: dict[str, Tensor], version: int) -> float:
        return self.engine.update_weights(weights.items(), version).seconds

    def abort(self) -> None:
        self.engine.abort()

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def reader(self) -> RequestReader:
        return self.engine._reader


@dataclass(frozen=True)
class PoolReport:
    """What a pool has done.

    Attributes:
        version: Policy version in force.
        exactness: The lowest level among the engines; at E2 a replay is bitwise the same.
        replaced: Engines that were replaced: lost, silent, or with an update that another one could not take.
        replayed: Samples that were started again because their engine was lost.
        spec: Speculation counts, summed over the engines.
        engines: Each engine's own statistics; a replacement's start from zero.
    """

    version: int
    exactness: str
    replaced: int
    replayed: int
    spec: SpecCounts
    engines: tuple[EngineStats, ...]


class EnginePool:
    """Rollout engines in processes of their own, on one machine or many.

    Args:
        model: Folder of a Hugging Face checkpoint, readable from every machine.
        config: An `EngineConfig` or a mapping with its names, for all engines. They share its `seed`: ids tell samples
            apart, so a pool of any size draws what one engine would.
        size: Engines.
        version: Policy version of the checkpoint.
        timeout: Seconds after which a call fails if no group finishes, or an engine does not answer.
        actor_options: Ray's options for each engine, such as `{"num_gpus": 1}`; default one CPU. All engines should
            run on the same kind of device with the same number of threads, else trajectories depend on the engine.

    Raises:
        InvalidRequest: An argument is wrong, or the verifier is one that cannot replay.
        UnsupportedModel: The checkpoint is of a kind that the engine does not run.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | Mapping[str, Any] | None = None,
        *,
        size: int = 2,
        version: int = 0,
        timeout: float = 1800.0,
        actor_options: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise invalid("size", size, "use an integer >= 1")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise invalid("timeout", timeout, "use a number of seconds > 0")
        config = config if isinstance(config, EngineConfig) else EngineConfig.from_dict(config or {})
        if config.speculation.verifier == "rejection":
            remedy = "what a lost engine had sampled could not be repeated; use coupled"
            raise invalid("speculation.verifier", "rejection", remedy)
        self.config = replace(config, speculation=replace(config.speculation, verifier="coupled"))
        ModelSpec.from_hf_config(read_config(model))
        self.timeout = timeout
        self._path, self._options = str(Path(model).resolve()), {"num_cpus": 1, **(actor_options or {})}
        self._first = self._version = version
        self._weights: Any = None
        self._lengths = Lengths()
        self._submitted: Counter[str] = Counter()
        self._replaced = self._replayed = 0
        self._lock = threading.RLock()
        self._actors = [self._start() for _ in range(size)]
        try:
            self._reader: RequestReader = self._ask_all("reader")[0]
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int | None = None,
        seeds: Sequence[int] | None = None,
        request_ids: Sequence[str] | None = None,
    ) -> list[Completion]:
        """The completions `RolloutEngine.generate` would give for the same arguments, in the same order.

        Raises:
            InvalidRequest: A prompt or parameter cannot be honoured; nothing is left running.
            PoolError: No group finished within `timeout`, or one lost several engines.
        """
        with self._lock:
            self._check_open()
            requests = self._requests(*self._reader.read(prompts, sampling_params, n, seeds, request_ids))
            queue = group_siblings(requests, self._lengths)
            flights: dict[Any, tuple[int, Group]] = {}
            answers: dict[int, list[Completion]] = {}
            try:
                while queue or flights:
                    for engine, group in place(queue, self._in_flight(flights), self.config.max_num_seqs):
                        queue.remove(group)
                        flights[self._actors[engine].generate.remote(group.requests)] = (engine, group)
                    ref = self._next(flights)
                    engine, group = flights[ref]
                    try:
                        results = _get(ref, self.timeout)
                    except LOST as error:
                        queue = sorted(queue + self._replace(engine, flights, error), key=lambda g: g.order)
                        continue
                    del flights[ref]
                    answers |= {request.row: result for request, result in zip(group.requests, results)}
                    self._lengths.saw(group.requests[0].prompt, [c for result in results for c in result])
            except BaseException:
                self._ask({engine for engine, _ in flights.values()}, "abort")
                raise
            return [completion for row in range(len(requests)) for completion in answers[row]]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int | None = None) -> float:
        """Give every engine a complete set of `(name, tensor)` pairs; seconds that the slowest took.

        They are put into Ray's object store once, whatever the number of engines, and kept there for replacements.
        An update waits for the rollout in progress: no sample is of two policies. If it fails anywhere, the old weights
        stay in force everywhere: engines that may have taken it are started again from them.

        Raises:
            WeightError: Something does not fit; all engines refuse it.
        """
        with self._lock:
            self._check_open()
            now = self._version + 1 if version is None else version
            stored = ray.put({name: tensor.detach().cpu() for name, tensor in weights})
            everyone = range(len(self._actors))
            try:
                answers = self._answers(everyone, "update_weights", stored, now)
            except BaseException:
                self._restart(everyone)
                raise
            errors = {engine: answer for engine, answer in answers.items() if isinstance(answer, Exception)}
            failed = [error for error in errors.values() if not isinstance(error, GONE)]
            if failed:
                self._restart(e for e in everyone if not isinstance(errors.get(e), WeightError))
                raise failed[0]
            self._weights, self._version = stored, now
            for engine, error in errors.items():
                self._replace(engine, {}, error)
            self._submitted.clear()
            return max((answer for engine, answer in answers.items() if engine not in errors), default=0.0)

    def report(self) -> PoolReport:
        """What the engines say, and what had to be mended."""
        with self._lock:
            self._check_open()
            engines = tuple(self._ask_all("stats"))
            spec = sum((stats.spec for stats in engines), SpecCounts())
            exactness = min(stats.exactness for stats in engines)
            return PoolReport(self._version, exactness, self._replaced, self._replayed, spec, engines)

    def close(self) -> None:
        """End the engines; harmless twice."""
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._actors:
            raise PoolError("the pool is closed; make another")

    def _start(self) -> Any:
        """A new engine. The weights in force come with its construction, for later calls could overtake them."""
        actor = ray.remote(EngineActor).options(**self._options)
        return actor.remote(self._path, self.config.to_dict(), self._first, self._weights, self._version)

    def _requests(self, prompts: list, params: list[SamplingParams], ids: list[str] | None) -> list[Request]:
        rows = [(tuple(tokens.tolist()), p) for tokens, p in zip(prompts, params)]
        ids = ids or [self._own_id(tokens, p.seed) for tokens, p in rows]
        return [Request(row, *rows[row], request_id) for row, request_id in enumerate(ids)]

    def _own_id(self, tokens: tuple[int, ...], seed: int | None) -> str:
        """The id that one engine would have given; see `RolloutEngine`."""
        place = f"v{self._version}-{fold(*tokens) % 2**64:016x}" + ("" if seed is None else f"-seed{seed}")
        self._submitted[place] += 1
        return f"{place}-{self._submitted[place] - 1}"

    def _in_flight(self, flights: Mapping[Any, tuple[int, Group]]) -> dict[int, list[Group]]:
        return {e: [g for at, g in flights.values() if at == e] for e in range(len(self._actors))}

    def _next(self, flights: Mapping[Any, tuple[int, Group]]) -> Any:
        """The next group that is finished, or whose engine is lost."""
        ready, _ = ray.wait(list(flights), timeout=self.timeout)
        if not ready:
            remedy = f"{len(flights)} are in flight; raise timeout, or look at the engines' logs"
            raise PoolError(f"no group finished within timeout={self.timeout:g} s: {remedy}")
        return ready[0]

    def _replace(self, engine: int, flights: dict[Any, tuple[int, Group]], error: Exception) -> list[Group]:
        """Put a new engine in a lost one's place; what it was sampling, to be sampled again under the same ids."""
        refs = [ref for ref, (at, _) in flights.items() if at == engine]
        groups = [flights.pop(ref)[1] for ref in refs]
        groups = [replace(group, losses=group.losses + 1) for group in groups]
        ray.kill(self._actors[engine])
        self._actors[engine] = self._start()
        self._replaced += 1
        self._replayed += sum(group.samples for group in groups)
        for group in groups:
            if group.losses >= LOSSES:
                lost = f"{LOSSES} engines were lost while they sampled {group.requests[0].request_id}"
                raise PoolError(f"{lost}; look at their logs for the reason, often memory") from error
        return groups

    def _restart(self, engines: Iterable[int]) -> None:
        """Have them start again from the weights in force."""
        for engine in engines:
            ray.kill(self._actors[engine])
            self._actors[engine] = self._start()
            self._replaced += 1

    def _answers(self, engines: Iterable[int], method: str, *arguments: Any) -> dict[int, Any]:
        """What each of these engines answers, or the error that comes instead; they have `timeout` together."""
        refs = {engine: getattr(self._actors[engine], method).remote(*arguments) for engine in engines}
        end = time.monotonic() + self.timeout
        answers: dict[int, Any] = {}
        for engine, ref in refs.items():
            try:
                answers[engine] = _get(ref, self.timeout, end)
            except Exception as error:  # noqa: PERF203
                answers[engine] = error
        return answers

    def _ask(self, engines: Iterable[int], method: str, *arguments: Any) -> list[Any]:
        """What these engines answer; one that is lost, or does not answer in time, is replaced instead."""
        answers = self._answers(engines, method, *arguments)
        for engine, answer in answers.items():
            if isinstance(answer, GONE):
                self._replace(engine, {}, answer)
            elif isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers.values() if not isinstance(answer, Exception)]

    def _ask_all(self, method: str) -> list[Any]:
        for _ in range(LOSSES):
            answers = self._ask(range(len(self._actors)), method)
            if len(answers) == len(self._actors):
                return answers
        raise PoolError(
            f"engines were lost or silent {LOSSES} times in a row; look at their logs for the reason"
        )


def _get(ref: Any, seconds: float, end: float | None = None) -> Any:
    """Ray's answer, within so long or until `end`, by `time.monotonic`; an error of this package comes as itself."""
    try:
        return ray.get(ref, timeout=seconds if end is None else max(0.0, end - time.monotonic()))
    except RayTaskError as error:
        if isinstance(error.cause, RolloutSpecError):
            raise error.cause from None
        raise
    except GetTimeoutError as error:
        raise PoolError(f"an engine did not answer within {seconds:g} s; look at its log") from error
