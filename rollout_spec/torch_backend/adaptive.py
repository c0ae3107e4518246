"""A trained drafter in a backend: what it reads, whether it may draft, and how it enters.

A drafter that has just been published costs nobody anything yet: in `_SHADOW_SHARE` of the passes it drafts one token
behind every sequence, which is judged as a draft and not used. After `SHADOW_TOKENS` of them its acceptance is known,
its steps have been timed, and it stands beside the other drafters for the policy to choose from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rollout_spec.drafters.base import DraftRound, Proposal, draft
from rollout_spec.drafters.eagle import EagleDrafter
from rollout_spec.drafters.eagle_spec import EagleSpec
from rollout_spec.drafters.guard import DrafterGuard, DrafterReport
from rollout_spec.models.decoder import Decoder
from rollout_spec.policy.cost_model import CostModel, PassCost, fit
from rollout_spec.policy.records import PassTiming
from rollout_spec.sampling import verify
from rollout_spec.sampling.noise import row_keys
from rollout_spec.sampling.table import SamplingTable
from rollout_spec.torch_backend.attention import PagedAttention, Rows
from rollout_spec.torch_backend.following import Follower

if TYPE_CHECKING:
    from rollout_spec.torch_backend.backend import TorchBackend

SHADOW_TOKENS = 256  # drafted in shadow
_SHADOW_EVERY = 8  # passes
_BATCHES, _CONTEXTS, _STEPS, _REPEATS = (1, 4, 16), (64, 512), 2, 3

logger = logging.getLogger("rollout_spec")


class Adaptive:
    """The drafter in force and its surroundings.

    Args:
        backend: Started.
        drafter: The first one published.

    Attributes:
        drafter: In force, or in shadow.
        guard: Whether it may be used.
        follower: Its cache.
        shadow_left: Tokens still to be drafted in shadow.
    """

    def __init__(self, backend: TorchBackend, drafter: EagleDrafter) -> None:
        self._backend, self.drafter = backend, drafter
        spec, config = drafter.spec, backend.config.speculation
        features = backend.keep_features(spec.feature_layers)
        self.follower = Follower(
            features,
            backend.runner,
            backend.slots,
            spec.num_kv_heads,
            spec.head_dim,
            backend.dtype,
            backend.device,
        )
        self.guard = DrafterGuard(config, until="or with others until the next is published (drafter version")
        self.shadow_left = SHADOW_TOKENS if config.shadow else 0
        self._passes = 0
        self._cost: PassCost | None = None  # of its step, once measured

    def serves(self, spec: EagleSpec) -> bool:
        """Whether a drafter of this shape can take the place of the one in force."""
        return spec == self.drafter.spec

    @property
    def usable(self) -> bool:
        """Whether it may draft what is verified."""
        return not self.shadow_left and self.guard.check(self.drafter, self.drafter.version)

    @property
    def in_use(self) -> int | None:
        """The version that may draft."""
        return self.drafter.version if self.usable else None

    @property
    def reports(self) -> tuple[DrafterReport, ...]:
        return tuple(self.guard.reports)

    @torch.inference_mode()
    def publish(self, drafter: EagleDrafter) -> None:
        """Put `drafter` in force, between two steps. One that follows another keeps its place and what is known of it."""
        self.drafter = drafter
        self._restart()
        self.guard.after_update(drafter, drafter.version, lambda context: None)
        if self._cost is None:
            self._cost = self.costs().passes[drafter.name]
        self._backend.policy.add_drafter(drafter.name, self._cost)

    @torch.inference_mode()
    def after_update(self, target: Decoder, version: int) -> None:
        """The policy has new weights: what it lends the drafter is made anew, and all is read again."""
        self._restart()
        try:
            self.drafter.commit(target, version)
        except Exception as error:  # a guest's failure
            self.guard.failed(self.drafter, error)

    def propose(self, round: DraftRound, rows: np.ndarray, lengths: np.ndarray) -> Proposal | None:
        """What it drafts for the slots `rows [B]`, or None if it raised."""
        follow = self.follower.round(rows, lengths)
        return self.guard.propose(self.drafter, lambda: self.drafter.propose(replace(round, follow=follow)))

    def observe(self, healthy: bool, tried: int, accepted: int) -> None:
        """Judge a verified proposal, see `DrafterGuard.observe`."""
        self.guard.observe(healthy, tried, accepted, self.drafter.version)

    def shadow(self, rows: np.ndarray, table: SamplingTable) -> Shadow | None:
        """What it drafts behind the slots `rows [B]` without being asked, now and then while it is new."""
        self._passes += 1
        due = self.shadow_left and self._passes % _SHADOW_EVERY == 0
        if not due or not self.guard.check(self.drafter, self.drafter.version):
            return None
        backend = self._backend
        batch = table.select(torch.from_numpy(rows).to(backend.device), rows.tolist())
        positions = torch.from_numpy(backend.slots.length[rows, None]).to(backend.device)
        keys = row_keys(batch.key, backend.weights.version, positions)
        ones = np.ones(len(rows), np.int64)

        def process(raw: Tensor, step: int, drafted: list[Tensor]) -> Tensor:
            return batch.process(raw).logits

        round = DraftRound((len(rows),), backend.coupled, _shares_no_cache, process, lambda step: keys)
        proposal = self.propose(round, rows, ones)
        return None if proposal is None else Shadow(self, rows, proposal, keys)

    def judged(self, rows: np.ndarray, accepted: np.ndarray, healthy: bool) -> None:
        """Learn from drafts in shadow."""
        self._backend.policy.observe_shadow(self.drafter.name, rows, accepted)
        self.guard.observe(healthy, len(rows), int(accepted.sum()), self.drafter.version)
        self.shadow_left = max(0, self.shadow_left - len(rows))
        if not self.shadow_left:
            logger.info("drafter %s, version %d, leaves the shadow", self.drafter.name, self.drafter.version)

    def costs(self) -> CostModel:
        """Its step, its draw included, timed on scratch memory for a few batches and contexts."""
        timings, device = [], self._backend.device
        for batch in _BATCHES:
            for context in _CONTEXTS:
                run = self._on_scratch(batch, context)
                for _ in range(_REPEATS):
                    _synchronize(device)
                    start = time.perf_counter()
                    run()
                    _synchronize(device)
                    seconds = (time.perf_counter() - start) / _STEPS
                    timings.append(PassTiming(self.drafter.name, batch, batch, batch * context, seconds))
        return fit(timings)

    def _on_scratch(self, batch: int, context: int) -> Callable[[], Proposal]:
        """What drafts `_STEPS` tokens of so many sequences, each of so many tokens, of scratch memory."""
        cache, drafter, device = self.follower.cache, self.drafter, self._backend.device
        blocks = -(-context // cache.block_size)
        tables = torch.full((batch, blocks), cache.scratch_block, device=device)
        sink = torch.full((batch,), cache.sink_block, device=device)
        kv_rows = cache.rows(sink, torch.arange(batch, device=device) % cache.block_size)
        last = torch.full((batch, 1), blocks * cache.block_size - 1, device=device)
        attend = PagedAttention(cache, Rows(kv_rows, tables, last), drafting=True)
        states = torch.zeros(batch, drafter.spec.hidden_size, dtype=self._backend.dtype, device=device)
        ids = torch.zeros(batch, dtype=torch.int64, device=device)

        def forward(tokens: Tensor | None, step: int) -> Tensor:
            return drafter.logits(drafter.model.hidden(ids, ids, states, attend, own=True))[:, None]

        def process(raw: Tensor, step: int, drafted: list[Tensor]) -> Tensor:
            return raw

        active, keys = (batch,) * _STEPS, ids[:, None]
        round = DraftRound(
            active,
            self._backend.coupled,
            _shares_no_cache,
            process,
            lambda step: keys,
            more=lambda leads: True,
        )
        return lambda: draft(round, forward)

    def _restart(self) -> None:
        self._backend.scheduler.unread()
        if not self.follower.cache.released:
            self.follower.cache.clear()


@dataclass(frozen=True)
class Shadow:
    """Drafts that nobody asked for, one behind each of the sequences in `rows [B]`."""

    adaptive: Adaptive
    rows: np.ndarray
    proposal: Proposal
    keys: Tensor

    def judge(
        self, rows: np.ndarray, processed: Tensor, ragged: verify.Ragged | None, verdict: verify.Verdict
    ) -> None:
        """Compare with a pass over the slots `rows`, some of these in another order, as verification would have."""
        place = np.searchsorted(self.rows, rows, sorter=(order := np.argsort(self.rows)))
        at = torch.from_numpy(order[place]).to(self.keys.device)
        drafts, logits = self.proposal.tokens[0][at], self.proposal.logits
        if logits is None:
            accepted = drafts[:, 0] == verdict.tokens[:, 0]
        else:
            p = processed[:, :1] if ragged is None else processed[ragged.place[:, 0]]
            found = verify.verify_rejection(
                torch.cat((p, p), 1), drafts, None, logits[0][at], self.keys[at].expand(-1, 2)
            )
            accepted = found.accepted > 0
        self.adaptive.judged(rows, accepted.cpu().numpy().astype(np.int64), bool(self.proposal.healthy))


def _shares_no_cache(model: Decoder, tokens: Tensor | None, step: int) -> Tensor:
    raise AssertionError("a drafter in shadow has a cache of its own")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
