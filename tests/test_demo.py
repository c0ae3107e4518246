"""`rollout-spec demo`, its live view, and the quickstart, on a random policy that speaks ASCII."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout_spec import RolloutEngine, SamplingParams, cli, example_policy
from rollout_spec.commands import demo
from rollout_spec.contracts import RolloutSpecError
from rollout_spec.drafters.quantize import usual_quantizer
from rollout_spec.observe.live import LiveRollouts, Meter
from rollout_spec.observe.report import Report
from rollout_spec.policy.baselines import Fixed
from rollout_spec.torch_backend import backend as backend_module

ROOT = Path(__file__).parents[1]
ARITHMETIC = ROOT / "examples" / "arithmetic"


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> Path:
    """A random policy with the example's vocabulary and tokenizer."""
    sys.path.insert(0, str(ARITHMETIC))
    from tokenizer import EOS, PAD, VOCAB, build_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=640,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    path = tmp_path_factory.mktemp("policy")
    model.save_pretrained(path)
    build_tokenizer(512).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _drafts(monkeypatch):
    """Whether drafting pays on so small a policy is a matter of luck: always draft."""

    def make(folder: Path, seed: int) -> RolloutEngine:
        engine = real(folder, seed)
        engine.backend.policy = Fixed(4)
        return engine

    real = demo._engine
    monkeypatch.setattr(demo, "_engine", make)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.main, ["demo", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def test_the_demo_shows_the_same_trajectories_and_both_times(policy, tmp_path):
    status, output = run(policy, "--requests", 3, "--group", 2, "--json", tmp_path / "d.json")
    assert status == 0, output
    assert "6 of 6 trajectories identical" in output
    assert "makespan" in output and "speedup" in output and "evidence L1" in output
    report = Report.read(tmp_path / "d.json")
    plain, speculative = (report.results["rollouts"][name] for name in ("plain", "speculative"))
    assert plain["tokens"] == speculative["tokens"] > 0
    assert plain["tau"] is None and speculative["tau"] > 1
    assert report.results["speedup"] == pytest.approx(plain["makespan"] / speculative["makespan"])
    assert plain["length_median"] <= plain["length_p99"] <= plain["length_max"] <= demo.MAX_TOKENS


def test_without_a_terminal_there_are_plain_lines_only(policy):
    _, output = run(policy, "--requests", 2, "--group", 1)
    assert "\x1b" not in output and "\r" not in output
    assert re.search(r"^speculative: 2 of 2 samples, [\d,]+ tokens, .*tau", output, re.MULTILINE)


def test_trajectories_that_differ_fail_the_demo(policy, monkeypatch):
    def shifted(base, version, position):
        return real(base, version, position + int(position.shape[1] > 1))

    real = backend_module.row_keys
    monkeypatch.setattr(backend_module, "row_keys", shifted)
    status, output = run(policy, "--requests", 2, "--group", 2)
    assert status == 1 and "FAILED" in output


def test_a_missing_policy_is_said_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "problems.py").write_text((ARITHMETIC / "problems.py").read_text())
    (tmp_path / "expand.py").write_text("")
    monkeypatch.setattr(example_policy, "example_folder", lambda: tmp_path)
    status, output = run()
    assert status == 2 and "no policy here" in output and "name a model of your own" in output


def test_the_grown_policy_is_made_once_and_again_when_the_policy_changes(tmp_path, monkeypatch):
    def grow(command, **_):
        made.append(command)
        Path(command[command.index("--out") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    made: list[list[str]] = []
    weights = tmp_path / "policy" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    (tmp_path / "expand.py").write_text("")
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", grow)
    monkeypatch.setattr(example_policy, "example_folder", lambda: tmp_path)
    first = example_policy.expanded_policy("100m")
    assert example_policy.expanded_policy("100m") == first and len(made) == 1
    assert example_policy.expanded_policy("100m", vocab=64) != first and len(made) == 2
    assert first.parent == tmp_path / "cache" and "--size" in made[0]
    weights.write_bytes(b"2")
    assert example_policy.expanded_policy("100m") != first and len(made) == 3


def test_growing_that_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "expand.py").write_text("raise ValueError('too small')")
    monkeypatch.setenv("ROLLOUT_SPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(example_policy, "example_folder", lambda: tmp_path)
    with pytest.raises(RolloutSpecError, match="too small"):
        example_policy.expanded_policy("100m")
    assert list((tmp_path / "cache").iterdir()) == []


def test_problems_are_spread_over_all_lengths():
    problems = example_policy.load_problems().sample(100, 0, "test")
    lengths = [len(problem.prompt) for problem in demo.spread(problems, 5)]
    assert lengths == sorted(lengths)
    assert lengths[0] == min(len(p.prompt) for p in problems)
    assert lengths[-1] == max(len(p.prompt) for p in problems)
    assert len(demo.spread(problems, 1)) == 1


# --- the live view


def test_the_meter_counts_what_the_completions_count(policy):
    engine = RolloutEngine.from_pretrained(
        policy, dtype="float32", speculation={"drafter": usual_quantizer("cpu", torch.float32)}
    )
    watch = LiveRollouts(Console(file=io.StringIO()), ["run"])
    params = SamplingParams(n=4, max_tokens=60, ignore_eos=True)
    meters = []
    real = Meter.read

    class Kept(Meter):
        def read(self):
            meters.append(real(self))
            return meters[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout_spec.observe.live.Meter", Kept)
        completions = watch.run("run", engine, 8, lambda: engine.generate(["1+2=", "3*4="], params))
    last = meters[-1]
    assert (last.finished, last.tokens, last.live) == (8, 8 * 60, 0)
    assert last.spec == sum((c.spec for c in completions[1:]), completions[0].spec)
    tokens = [meter.tokens for meter in meters]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(policy, width):
    engine = RolloutEngine.from_pretrained(
        policy, dtype="float32", speculation={"drafter": usual_quantizer("cpu", torch.float32)}
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    watch = LiveRollouts(console, ["plain", "speculative"])
    params = SamplingParams(n=2, max_tokens=200, ignore_eos=True)  # long enough to be seen
    with watch.shown():
        watch.run("plain", engine, 2, lambda: engine.generate("1+2=", params))
    shown = Console(width=width, file=io.StringIO())
    shown.print(watch.table())
    lines = shown.file.getvalue().splitlines()
    assert len(lines) == 3 and all(len(line) <= width for line in lines)
    assert "2/2" in lines[1] and "…" not in lines[1]


def test_an_error_of_the_rollout_is_raised(policy):
    engine = RolloutEngine.from_pretrained(policy, dtype="float32", speculation={"drafter": "none"})
    watch = LiveRollouts(Console(file=io.StringIO()), ["run"])
    with pytest.raises(RolloutSpecError, match="at least one token"):
        watch.run("run", engine, 1, lambda: engine.generate([[]]))


# --- the quickstart


def test_the_quickstart_runs(policy):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--policy", str(policy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "the same tokens as without the interruption" in done.stdout
    assert "version 1 in force" in done.stdout
    (difference,) = re.findall(r"disagree about a logprob by (\S+)", done.stdout)
    assert float(difference) < 1e-3
