"""`rollout-spec verify` shows what holds, and fails when anything is broken on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout_spec import cli
from rollout_spec.commands.verify import default_prompts, read_prompts
from rollout_spec.contracts import InvalidRequest
from rollout_spec.drafters import quantized
from rollout_spec.drafters.guard import DrafterGuard
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.observe.report import Report
from rollout_spec.proofs import distribution
from rollout_spec.proofs.distribution import chi_square
from rollout_spec.sampling import verify as verifiers
from rollout_spec.torch_backend import backend as backend_module
from rollout_spec.torch_backend.runner import Runner

VOCAB = 61
DRAFTER = usual_quantizer("cpu", torch.float32)
QUICK = ("--requests", 2, "--seeds", 2, "--max-tokens", 32, "--samples", 600, "--drafter", DRAFTER)
NOISE = 3e-6  # of logits, where a device that is not row-invariant is played


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A random policy whose quantized copy is wrong often enough to be caught."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    path = tmp_path_factory.mktemp("policy")
    model.save_pretrained(path)
    return path


def verify(folder: Path, *options: object) -> tuple[int, dict[str, bool], Report | None, str]:
    """Exit status, checks by name, the report and the output."""
    file = folder / "report.json"
    file.unlink(missing_ok=True)
    arguments = [str(a) for a in ("verify", folder, *QUICK, "--json", file, *options)]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    report = Report.read(file) if file.exists() else None
    checks = {} if report is None else {check.name: check.passed for check in report.checks}
    return result.exit_code, checks, report, result.output


def failing(folder: Path, *options: object) -> set[str]:
    """Names of the checks that fail; the command must fail with them."""
    status, checks, report, output = verify(folder, *options)
    assert status == 1, output
    assert "FAILED" in output
    assert report is not None
    return {name for name, passed in checks.items() if not passed}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_engine_passes_and_reaches_bitwise_exactness(folder, dtype):
    status, checks, report, output = verify(folder, "--dtype", dtype)
    assert status == 0, output
    assert len(checks) == 14 and all(checks.values())
    assert report.results["exactness"] == "E2" and "exactness shown: E2" in output
    assert report.results["dtype"] == dtype
    assert report.results["found"]["logprobs, rejection"]["worst"] == 0
    assert 0 < report.results["found"]["speculation"]["runs"]["on"]["acceptance"] < 1
    assert report.results["found"]["chi-square, rejection"]["residual"] > 300


# --- broken on purpose


def test_a_residual_that_is_not_one_is_found(folder, monkeypatch):
    def without_residual(target, drafts, lengths, q, keys, ragged=None, q_place=None):
        verdict = real(target, drafts, lengths, q, keys, ragged, q_place)
        noise = verifiers.uniform(keys if ragged is None else ragged.rows(keys), verifiers.Stream.RESIDUAL)
        again = verifiers._draw(target, noise)
        again = again if ragged is None else ragged.grid(again)
        place = verdict.accepted[:, None]
        return verdict._replace(tokens=verdict.tokens.scatter(1, place, again.gather(1, place)))

    real = verifiers.verify_rejection
    monkeypatch.setattr(verifiers, "verify_rejection", without_residual)
    assert "chi-square, rejection" in failing(folder)


def test_drafts_accepted_too_readily_are_found(folder, monkeypatch):
    def lenient(target, drafts, lengths, q, keys, ragged=None, q_place=None):
        if q is not None:
            batch, width = keys.shape
            place = torch.arange(batch * width).view(batch, width) if ragged is None else ragged.place
            drafted, target = q_place >= 0, target.clone()
            rows = target.flatten(0, 1)
            rows[place[:, :-1][drafted]] = rows[place[:, :-1][drafted]].maximum(q[q_place[drafted]])
        return real(target, drafts, lengths, q, keys, ragged, q_place)

    real = verifiers.verify_rejection
    monkeypatch.setattr(verifiers, "verify_rejection", lenient)
    assert "chi-square, rejection" in failing(folder)


def test_noise_at_another_position_when_speculating_is_found(folder, monkeypatch):
    def shifted(base, version, position):
        return real(base, version, position + int(position.shape[1] > 1))

    real = backend_module.row_keys
    monkeypatch.setattr(backend_module, "row_keys", shifted)
    failed = failing(folder)
    assert {"trajectory, on", "trajectory, toggled", "trajectory, K random", "noise, recomputed"} <= failed
    assert "exactness claimed" in failed


def test_one_noise_for_all_positions_is_found(folder, monkeypatch):
    """Speculation on and off agree then; what is sampled is not the policy."""

    def stuck(base, version, position):
        return real(base, version, position * 0)

    real = backend_module.row_keys
    monkeypatch.setattr(backend_module, "row_keys", stuck)
    failed = failing(folder)
    assert "noise, recomputed" in failed
    assert "trajectory, on" not in failed


def test_logprobs_off_by_one_are_found(folder, monkeypatch):
    def rolled(*arguments):
        return [x.roll(1, -1) for x in real(*arguments)]

    real = backend_module.token_logprobs
    monkeypatch.setattr(backend_module, "token_logprobs", rolled)
    failed = failing(folder)
    assert {"logprobs, coupled", "logprobs, rejection"} <= failed


def test_speculation_that_is_silently_off_is_found(folder, monkeypatch):
    monkeypatch.setattr(DrafterGuard, "usable", lambda *_: False)
    _, checks, report, output = verify(folder)
    assert not checks["drafter in use"]
    assert report.results["exactness"] is None and "no level was shown" in output


def test_a_drafter_that_fails_is_found(folder, monkeypatch):
    def broken(self, round):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(quantized.QuantizedSelfDrafter, "propose", broken)
    _, checks, report, _ = verify(folder)
    assert not checks["drafter in use"]
    assert "out of luck" in report.results["found"]["speculation"]["drafter_reports"][0]


def test_a_drafter_that_alters_the_cache_of_the_target_is_found(folder, monkeypatch):
    def vandal(self, round):
        proposal = real(self, round)
        engines[-1].cache.clear()
        return proposal

    class Watched(backend_module.TorchBackend):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            engines.append(self)

    engines: list[backend_module.TorchBackend] = []
    real = quantized.QuantizedSelfDrafter.propose
    monkeypatch.setattr("rollout_spec.engine.TorchBackend", Watched)
    monkeypatch.setattr(quantized.QuantizedSelfDrafter, "propose", vandal)
    assert {"trajectory, on", "greedy", "logprobs, coupled"} <= failing(folder)


def test_tokens_of_the_wrong_version_are_found(folder, monkeypatch):
    real = backend_module.record_versions

    def shifted(slots, rows, appended, version):
        real(slots, rows, appended * 0, version)

    monkeypatch.setattr(backend_module, "record_versions", shifted)
    failed = failing(folder)
    assert failed & {"versions", "update in flight"}


def test_an_update_that_the_drafter_does_not_follow_is_found(folder, monkeypatch):
    def stays(self, target, version):
        real(self, target, min(version, 0))

    real = quantized.QuantizedSelfDrafter.commit
    monkeypatch.setattr(quantized.QuantizedSelfDrafter, "commit", stays)
    assert "weight update" in failing(folder)


# --- a device that is not row-invariant


def uneven(monkeypatch, scale: float) -> None:
    """Logits whose last bits depend on how many rows are computed together."""

    def forward(self, model, block, tokens, *rest, **options):
        logits = real(self, model, block, tokens, *rest, **options)
        wave = torch.sin(torch.arange(logits.shape[-1]) * (1.0 + logits.shape[0] + 7 * logits.shape[1]))
        return logits + scale * wave

    real = Runner.forward
    monkeypatch.setattr(Runner, "forward", forward)


def test_where_rows_differ_in_the_last_bits_no_more_than_e1_is_claimed(folder, monkeypatch):
    uneven(monkeypatch, NOISE)
    monkeypatch.setattr(backend_module, "row_invariance", lambda *_: False)
    status, _, report, output = verify(folder, "--dtype", "float32")
    assert status == 0, output
    assert report.results["exactness"] == "E1"
    assert 0 < report.results["found"]["logprobs, coupled"]["worst"] <= 1e-5


def test_divergences_are_near_ties_where_rows_differ_more(folder, monkeypatch):
    uneven(monkeypatch, 0.02)
    monkeypatch.setattr(backend_module, "row_invariance", lambda *_: False)
    status, _, report, output = verify(folder, "--dtype", "bfloat16", "--seeds", 6)
    assert status == 0, output
    found = report.results["found"]["trajectory, on"]
    assert found["diverging"] > 0 and 0 < found["divergences_per_token"] < 0.1
    assert max(found["margins"]) <= found["near_tie"] < 0.2
    assert report.results["exactness"] == "E1"


def test_a_probe_that_is_wrong_does_not_get_e2_claimed(folder, monkeypatch):
    uneven(monkeypatch, NOISE)
    monkeypatch.setattr(backend_module, "row_invariance", lambda *_: True)
    status, checks, report, _ = verify(folder, "--dtype", "float32")
    assert status == 1
    assert not checks["logprobs, coupled"] and not checks["exactness claimed"]
    assert report.results["exactness"] != "E2"


# --- the test of the distribution


@pytest.mark.parametrize("seed", range(5))
def test_chi_square_is_scipys(seed):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(12))
    assert (1000 * probs >= distribution.LEAST_EXPECTED).sum() >= 8
    counts = rng.multinomial(1000, probs)
    pvalue, freedom = chi_square(counts, probs)
    alone = 1000 * probs >= distribution.LEAST_EXPECTED
    seen, expected = list(counts[alone]), list(1000 * probs[alone])
    if not alone.all():
        rest = 1000 * probs[~alone].sum()
        place = len(seen) if rest >= distribution.LEAST_EXPECTED else int(np.argmin(expected))
        if place == len(seen):
            seen, expected = [*seen, 0], [*expected, 0.0]
        seen[place] += counts[~alone].sum()
        expected[place] += rest
    assert freedom == len(seen) - 1
    assert pvalue == pytest.approx(stats.chisquare(seen, expected).pvalue, rel=1e-9)


def test_chi_square_refuses_the_impossible_and_what_cannot_be_tested():
    assert chi_square(np.array([50, 1, 49]), np.array([0.5, 0.0, 0.5])) == (0.0, 1)
    assert chi_square(np.array([100, 0]), np.array([1.0, 0.0])) == (1.0, 0)
    assert chi_square(np.array([3, 1]), np.array([0.5, 0.5])) == (1.0, 0)


# --- prompts and options


def test_prompts_come_from_text_and_json_lines(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("1+1=\n\n2+2=\n")
    rows = ["a", [1, 2], {"prompt": "b"}, {"prompt_token_ids": [3]}, {"prompt": [4]}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(text) == ["1+1=", "2+2="]
    assert read_prompts(lines) == ["a", [1, 2], "b", [3], [4]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n", "holds no prompt"),
        ("p.jsonl", "{", "p.jsonl:1.*not JSON"),
        ("p.jsonl", '"a"\n{"text": 1}', "p.jsonl:2.*give a string"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidRequest, match=message):
        read_prompts(tmp_path / name)


def test_default_prompts_suit_the_model():
    assert all(isinstance(prompt, str) for prompt in default_prompts(5, None))
    assert all(0 <= token < 61 for prompt in default_prompts(20, 61) for token in prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "{texts}", "--requests", 2), "no tokenizer"),
        (("--prompts", "{texts}", "--requests", 5), "--requests=5"),
        (("--device", "abacus"), "device='abacus'"),
    ],
)
def test_what_cannot_be_honoured_is_said_before_the_work(folder, tmp_path, options, message):
    texts = tmp_path / "texts.txt"
    texts.write_text("1+1=\n2+2=\n")
    status, _, report, output = verify(folder, *(str(option).format(texts=texts) for option in options))
    assert status == 2 and report is None
    assert message in output
