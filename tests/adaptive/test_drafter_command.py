"""`rollout-spec drafter train`, as a user calls it."""

import json
from pathlib import Path

from click.testing import CliRunner

from rollout_spec.adaptive.checkpoint import read_checkpoint
from rollout_spec.commands.drafter import command
from rollout_spec.example_policy import example_folder

POLICY = str(example_folder() / "policy")
SMALL = ("--count", "60", "--max-tokens", "24", "--steps", "8", "--decoded", "6", "--threads", "1")


def train(out: Path, *options: str):
    call = [
        "train",
        POLICY,
        "--out",
        str(out / "drafter"),
        "--json",
        str(out / "report.json"),
        *SMALL,
        *options,
    ]
    return CliRunner().invoke(command, call)


def test_a_drafter_starts_as_the_last_layer_and_is_measured_at_the_draft_length(tmp_path):
    done = train(tmp_path)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    config = results["config"]
    assert config["start"] == "layer" and config["relative_rate"] and config["unroll"] == 3
    assert config["objective"] == {"feature": 10.0, "kl": 0.3, "tv": 1.0}
    assert len(results["curve"][-1]["held_out"]["alpha"]) == 5
    assert results["decoded"]["rejection"]["tau"] > 1.5
    assert read_checkpoint(tmp_path / "drafter" / "step-00000008").config.start == "layer"


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    done = train(tmp_path, "--kind", "eagle3", "--start", "layer")
    assert done.exit_code != 0
    assert "--start='layer': kind 'eagle3' cannot; use --start random" in str(done.exception)
