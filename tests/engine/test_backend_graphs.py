"""The backend on graphs gives what it gives without them, whatever is padded, captured or eager.

On a CPU plain calls stand in for graphs: planning, padding, dispatch and renewal are the real ones.
"""

import pytest
import torch

from rollout_spec import SamplingParams
from rollout_spec.benchmarks.degrade import perturb
from rollout_spec.contracts import InvalidRequest
from rollout_spec.drafters.history import History
from rollout_spec.policy.baselines import Fixed, Off, RandomLengths
from rollout_spec.policy.graph_plan import DECODE, DRAFT, VERIFY, Graph, Kind
from rollout_spec.torch_backend import backend as backend_module
from rollout_spec.torch_backend import graph_passes
from rollout_spec.torch_backend.graph_passes import GraphPasses, expected_passes

from .conftest import DRAFTER, make_model

AMPLE, TIGHT = (
    1 << 30,
    60 << 20,
)  # every size that is expected, and a few: the tiny model's decode graph takes 6 MiB
POLICIES = {
    "plain": Off,
    "uniform": lambda: Fixed(3),
    "ragged": lambda: RandomLengths(3, longest=6, off=0.2, stops=False),  # captured loops are not stopped
}


@pytest.fixture
def graphs_of(monkeypatch):
    """Engines made within use graphs of `budget` bytes."""

    def use(budget=AMPLE):
        monkeypatch.setattr(backend_module, "choose_graphs", lambda backend: GraphPasses(backend, budget))

    return use


def outputs(engine, prompts, params=None, policy=None):
    """Everything a trainer sees; the ids fix the noise."""
    if policy is not None:
        engine.backend.policy = policy
    params = params or SamplingParams(max_tokens=24)
    ids = [f"r{row}" for row in range(len(prompts))]
    completions = engine.generate(prompts, params, request_ids=ids)
    return [
        (c.token_ids, c.logprobs, c.processed_logprobs, c.finish_reason, c.top_logprobs) for c in completions
    ]


def ran(engine, mode):
    """Passes of a mode on graphs, and eagerly."""
    counts = engine.backend.graphs.counts
    return counts[mode, True], counts[mode, False]


@pytest.mark.parametrize("budget", [AMPLE, TIGHT], ids=["ample", "tight"])
@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_with_and_without(make_engine, graphs_of, prompts, policy, verifier, budget):
    options = {"speculation": {"drafter": "int8", "verifier": verifier}, "max_num_seqs": 5}
    expected = outputs(make_engine(**options), prompts, policy=POLICIES[policy]())
    graphs_of(budget)
    engine = make_engine(**options)
    assert outputs(engine, prompts, policy=POLICIES[policy]()) == expected
    assert ran(engine, DECODE)[0] > (10 if policy == "plain" else -1) and not ran(engine, DECODE)[1]
    if policy != "plain":
        assert ran(engine, VERIFY)[0] and ran(engine, DRAFT)[0]


def test_history_drafts_eagerly_and_is_verified_on_graphs(make_engine, graphs_of, prompts):
    repeated = [[5, 6, 7, 8] * 6, *prompts[:2]]
    expected = outputs(make_engine(), repeated)
    graphs_of()
    engine = make_engine()
    engine.backend.history = History(10_000)
    assert outputs(engine, repeated, policy=RandomLengths(1, longest=5)) == expected
    assert ran(engine, VERIFY)[0]


STAGES = [
    SamplingParams(max_tokens=20, temperature=0.6),
    SamplingParams(max_tokens=20, temperature=0),
    SamplingParams(max_tokens=20, top_p=0.7, top_k=9),
    SamplingParams(max_tokens=20, repetition_penalty=1.3, frequency_penalty=0.2),
    SamplingParams(max_tokens=20, min_tokens=8, logit_bias={3: 2.0}, logprobs=3),
    SamplingParams(max_tokens=20, min_p=0.1, temperature=1.4),
]


@pytest.mark.parametrize("params", [*STAGES, STAGES], ids=lambda p: "all" if isinstance(p, list) else None)
def test_stages(make_engine, graphs_of, prompts, params):
    expected = outputs(make_engine(), prompts, params, Fixed(3))
    graphs_of()
    engine = make_engine()
    assert outputs(engine, prompts, params, Fixed(3)) == expected
    assert ran(engine, VERIFY)[0]
    if params is STAGES[0]:
        assert (
            ran(engine, DRAFT)[0] > ran(engine, DRAFT)[1]
        )  # at the end, one draft token is left to a loop of 4
    elif params is not STAGES:
        assert not ran(engine, DRAFT)[0]


def interrupted(engine, prompts, between):
    """Outputs of a run with `between()` after some steps."""
    groups = engine._submit(
        *engine._reader.read(prompts, SamplingParams(max_tokens=24), None, None, list("abcdef"))
    )
    for _ in range(3):
        engine._advance()
    between(engine)
    while engine.backend.has_work:
        engine._advance()
    return [(s.output.tolist(), s.logprobs.tolist(), s.version_starts) for group in groups for s in group]


def update(engine):
    engine.update_weights(make_model(seed=1).named_parameters())


def nap(engine):
    engine.sleep()
    assert not engine.backend.graphs or not engine.backend.graphs._captured
    engine.wake_up()


def deep_sleep(engine):
    engine.sleep(level=2)
    engine.wake_up()
    update(engine)


def update_asleep(engine):
    engine.sleep()
    update(engine)
    engine.wake_up()


@pytest.mark.parametrize("between", [update, nap, deep_sleep, update_asleep])
def test_graphs_follow_updates_and_sleep(make_engine, graphs_of, prompts, between):
    expected = interrupted(make_engine(), prompts, between)
    graphs_of()
    engine = make_engine()
    engine.backend.policy = Fixed(4)
    captured = engine.backend.graphs._captured
    assert interrupted(engine, prompts, between) == expected
    assert engine.backend.graphs._captured and engine.backend.graphs._captured[1] is not None
    assert (engine.backend.graphs._captured[0] is captured[0]) == (between is update), "the cache moved"
    assert ran(engine, VERIFY)[0] and not ran(engine, VERIFY)[1]
    assert ran(engine, DRAFT)[0] > ran(engine, DRAFT)[1]  # as in `test_stages`


def test_what_is_not_captured_is_eager(make_engine, graphs_of, prompts):
    """Replaced tensors would not be read by a graph; a stale drafter does not cost plain decoding its graphs."""
    expected = outputs(make_engine(), prompts)
    graphs_of()
    engine = make_engine()
    backend, counts = engine.backend, engine.backend.graphs.counts
    perturb(engine, 0.05)
    assert outputs(engine, prompts, policy=Fixed(3)) == expected
    assert not ran(engine, DRAFT)[0] and ran(engine, DRAFT)[1] and not ran(engine, VERIFY)[1]
    backend.graphs.capture()
    outputs(engine, prompts)
    assert ran(engine, DRAFT)[0]
    counts.clear()
    backend.coupled = False
    outputs(engine, prompts)
    assert not ran(engine, DRAFT)[0] and ran(engine, VERIFY)[0]
    counts.clear()
    backend.weights.target.weights = make_engine().backend.weights.target.weights
    outputs(engine, prompts, policy=Off())
    assert counts.keys() == {(DECODE, False)}


def test_a_drafter_that_raises_is_reported(make_engine, graphs_of, monkeypatch, prompts):
    expected = outputs(make_engine(), prompts)
    graphs_of()
    engine = make_engine()
    monkeypatch.setattr(engine.backend.weights.drafter, "propose", lambda round: 1 / 0)
    assert outputs(engine, prompts) == expected
    assert [report.cause for report in engine.stats().reports] == ["raised"]
    assert ran(engine, DECODE)[0] and not ran(engine, DECODE)[1]


@pytest.mark.parametrize("policy", ["uniform", "ragged"])
def test_a_broken_sequence_reaches_no_other(make_engine, graphs_of, policy):
    """Padding computes from it, too, and writes where nobody reads."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = torch.nan
        model.lm_head = torch.nn.Linear(64, 61, bias=False)
    model.config.tie_word_embeddings = False
    params = SamplingParams(max_tokens=16, logit_bias={60: -100.0})
    others = [[9, 8, 7], [4] * 20, [11, 12]]
    options = {
        "speculation": {"drafter": DRAFTER, "verifier": "coupled"}
    }  # NaN: the probe finds no row-invariance
    expected = outputs(make_engine(model, **options), others, params)
    graphs_of()
    engine = make_engine(model, **options)
    engine.backend.guard.observe = lambda *arguments: None  # the drafter is broken for that sequence, too
    found = outputs(engine, [*others, [5, 60, 6]], params, POLICIES[policy]())
    assert found[:3] == expected and ran(engine, VERIFY)[0]
    assert not engine.backend.cache.keys[:, :, engine.backend.cache.scratch_block].any()


def test_contexts_have_pools_of_their_own(make_engine, graphs_of, monkeypatch):
    monkeypatch.setattr(graph_passes, "_SHORTEST_CONTEXT", 32)
    expected = outputs(make_engine(), [[7] * 5, [3] * 180], SamplingParams(max_tokens=40))
    graphs_of()
    engine = make_engine()
    graphs = engine.backend.graphs
    assert list(graphs._pools) == [2, 8, 16]
    assert outputs(engine, [[7] * 5, [3] * 180], SamplingParams(max_tokens=40)) == expected
    outputs(engine, [[7] * 5])
    assert [pool.counts["graph"] > 0 for pool in graphs._pools.values()] == [True, False, True]


def test_calibrated_on_graphs(make_engine, graphs_of, monkeypatch, tmp_path, prompts):
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path))
    expected = outputs(make_engine(speculation="none"), prompts)
    graphs_of()
    engine = make_engine(speculation={"drafter": "int8", "draft_length": None})
    assert engine.stats().calibration == "brief" and engine.backend.calibration.key["graphs"]
    for mode in (DECODE, DRAFT, VERIFY):
        assert ran(engine, mode)[0]
    assert outputs(engine, prompts) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("drafter", [DRAFTER, "int8", "dense"])
@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
def test_captured_on_a_gpu(make_engine, prompts, caplog, verifier, drafter):
    """Tokens may part at near-ties, so the first ones are compared; nothing may have refused to be captured."""
    options = {"device": "cuda", "speculation": {"drafter": drafter, "verifier": verifier}}
    params = SamplingParams(max_tokens=6)
    engines = [make_engine(graph_bytes=budget, **options) for budget in (0, AMPLE)]
    for between in (lambda engine: None, update, lambda engine: (engine.sleep(), engine.wake_up())):
        found = []
        for engine in engines:
            between(engine)
            found.append([tokens[:2] for tokens, *_ in outputs(engine, prompts, params, Fixed(4))])
        assert found[0] == found[1]
    assert ran(engines[1], DRAFT)[0] and ran(engines[1], VERIFY)[0]
    assert not [record for record in caplog.records if "eagerly" in record.message]


# --- planning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speculation", "widths"),
    [
        ("none", []),
        ({"draft_length": 5}, [5]),
        ({"draft_length": None, "longest_draft": 7}, [1, 2, 4, 7]),
    ],
)
def test_what_is_planned(make_engine, monkeypatch, tmp_path, speculation, widths):
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path))
    backend = make_engine(speculation=speculation, max_num_seqs=8).backend
    (pool,) = GraphPasses(backend, AMPLE)._pools.values()
    sizes = pool.plan.buckets
    assert sizes.keys() == {
        Kind(DECODE, 1),
        *(Kind(DRAFT, k) for k in widths),
        *(Kind(VERIFY, k + 1) for k in widths),
    }
    assert all(set(found) <= {1, 2, 3, 4, 6, 8} and found[-1] == 8 for found in sizes.values())
    assert pool.plan.nbytes <= AMPLE
    enough = pool.plan.cost.nbytes([Graph(Kind(DECODE, 1), 8)])
    (pool,) = GraphPasses(backend, enough)._pools.values()
    assert sum(map(len, pool.plan.buckets.values())) == 1 and pool.plan.nbytes <= enough


def test_expected_passes():
    demand = expected_passes(200, [2, 15])
    assert {batch for batch, width in demand if width == 1} == {*(2**i for i in range(8)), *(3 * 2**i for i in range(7)), 200}  # fmt: skip
    assert max(batch for batch, width in demand if width == 16) == 32
    plain = sum(passes for (batch, width), passes in demand.items() if width == 1 and batch <= 32)
    assert sum(passes for (batch, width), passes in demand.items() if width > 1 and batch <= 32) == plain


def test_options(make_engine, model):
    assert make_engine().backend.graphs is None and make_engine(graph_bytes=0).backend.graphs is None
    with pytest.raises(InvalidRequest, match=r"graph_bytes=1000.*CUDA"):
        make_engine(graph_bytes=1000)
    with pytest.raises(InvalidRequest, match="graph_bytes=1000: use at least"):
        GraphPasses(make_engine().backend, 1000)
