"""The launch scripts for GPUs, composed and validated with verl's configuration; nobody ran them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

pytest.importorskip("verl")

from verl_configs import model_config  # noqa: E402
from verl_runs import EXAMPLES, POLICY  # noqa: E402

from rollout_spec.integrations.verl.options import read_options  # noqa: E402
from rollout_spec.integrations.verl.vllm_server import complete_arguments  # noqa: E402

SHOW = "#!/bin/sh\nexec {python} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n"


def settings_of(script: str, folder: Path) -> list[str]:
    """The arguments with which a script would start verl."""
    stub = folder / "python"
    stub.write_text(SHOW.format(python=sys.executable))
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(EXAMPLES / script)],
        env={**os.environ, "PYTHON": str(stub)},
        capture_output=True,
        text=True,
        check=True,
    )
    module, *settings = json.loads(done.stdout)[1:]
    assert module == "verl.trainer.main_ppo"
    return settings


def compose(settings: list[str]) -> Any:
    import verl.trainer
    from hydra import compose, initialize_config_dir

    config = Path(verl.trainer.__file__).parent / "config"
    with initialize_config_dir(str(config), version_base=None):
        return compose("ppo_trainer", overrides=settings)


@pytest.mark.parametrize(
    ("script", "estimator"),
    [("grpo_gpu.sh", "grpo"), ("ppo_gpu.sh", "gae"), ("grpo_vllm_gpu.sh", "grpo")],
)
def test_a_script_for_gpus(script: str, estimator: str, tmp_path: Path) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    settings = settings_of(script, tmp_path)
    if estimator == "gae":  # verl's check of a critic reads its model
        assert "critic.model.path=Qwen/Qwen2.5-7B-Instruct" in settings
        settings.append(f"critic.model.path={POLICY}")
    config = compose(settings)
    validate_config(
        config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )
    assert config.algorithm.adv_estimator == estimator and need_critic(config) == (estimator == "gae")
    assert (
        config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-7B-Instruct"
        and config.trainer.n_gpus_per_node == 8
    )
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    if "vllm" in script:
        assert rollout.name == "vllm" and rollout.max_model_len == 1536
        arguments = dict(rollout.engine_kwargs["vllm"])
        complete_arguments(arguments, str(POLICY), model_config())
        assert arguments["speculative_config"]["quantization"] == "rollout_spec_nf4"
    else:
        assert rollout.name == "rollout_spec"
        options = read_options(rollout, model_config())
        assert options.engine.kv_cache_bytes == 32 << 30 and options.engine.dtype == "bfloat16"
        assert options.engine.max_model_len == 1536
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    assert "NOT RUN" in text


def test_a_misspelt_setting_would_be_seen(tmp_path: Path) -> None:
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException):
        compose([*settings_of("grpo_gpu.sh", tmp_path), "actor_rollout_ref.rollout.max_num_sequences=3"])
