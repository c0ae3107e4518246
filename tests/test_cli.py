"""The command line: reports fit one schema, statuses mean what they say, and doctor tells the truth."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from rollout_spec import cli
from rollout_spec.commands import doctor
from rollout_spec.contracts import RolloutSpecError
from rollout_spec.observe import report as report_module
from rollout_spec.observe.report import Check, EvidenceLevel, ExactnessLevel, Report, ReportError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
}


def run(*arguments: object) -> click.testing.Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def make_report(**changes: object) -> Report:
    values: dict = {"command": "bench", "results": {"speedup": 1.25, "K": [1, 2]}, "seed": 3}
    values |= {"checks": [Check("lossless", 0.4, "p >= 0.01", True)], "evidence_level": EvidenceLevel.L1}
    return Report(**(values | changes))


def checkpoint(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- reports


def test_a_report_survives_the_round_trip(tmp_path: Path) -> None:
    report = make_report()
    report.write(tmp_path / "r.json")
    assert Report.read(tmp_path / "r.json") == report
    assert json.loads((tmp_path / "r.json").read_text())["evidence_level"] == "L1"


def test_a_report_says_where_and_with_what_it_was_made() -> None:
    report = make_report()
    assert report.machine.cores >= 1
    assert report.machine.threads == torch.get_num_threads()
    assert report.versions["torch"].startswith(torch.__version__.split("+")[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"command": ""}, "command"),
        ({"results": {"a": {"b": [1.0, math.nan]}}}, r"results\.a\.b\[1\]=nan"),
        ({"results": {"a": torch.tensor(1.0)}}, r"results\.a: Tensor"),
        ({"results": {3: 1}}, "key 3"),
        ({"checks": [Check("x", math.inf, "finite", False)]}, r"checks\[0\]\.value"),
        ({"checks": [Check("x", 1.0, "", True)]}, r"checks\[0\]: needs"),
        ({"versions": {"python": "3.11"}}, "rollout-spec is missing"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        make_report(**changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("seed"), "seed: missing"),
        (lambda d: d.update(speed=1), "speed: unknown"),
        (lambda d: d.update(schema_version=0), "schema_version=0"),
        (lambda d: d.update(evidence_level="L7"), "evidence_level='L7'"),
        (lambda d: d["checks"][0].pop("target"), r"checks\[0\]\.target: missing"),
        (lambda d: d["machine"].update(ram=1), r"machine\.ram: unknown"),
    ],
)
def test_a_file_with_another_schema_is_refused(edit, message: str) -> None:
    values = make_report().to_dict()
    edit(values)
    with pytest.raises(ReportError, match=message):
        Report.from_dict(values)


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("not json")
    with pytest.raises(ReportError, match="not a report"):
        Report.read(tmp_path / "r.json")


def test_every_level_has_its_meaning() -> None:
    assert [level.value for level in EvidenceLevel] == ["L0", "L1", "L2", "L3", "L4"]
    assert [level.value for level in ExactnessLevel] == ["E0", "E1", "E2"]
    assert all(level.meaning for level in (*EvidenceLevel, *ExactnessLevel))


@pytest.mark.parametrize("passed", [True, False])
def test_a_failed_check_fails_the_command_after_writing_the_report(tmp_path: Path, passed: bool) -> None:
    console = Console(record=True, width=80)
    report = make_report(checks=[Check("tokens [a, b]", False, "equal [bitwise]", passed)])
    if passed:
        report_module.finish(report, tmp_path / "r.json", console)
    else:
        with pytest.raises(SystemExit) as exit_info:
            report_module.finish(report, tmp_path / "r.json", console)
        assert exit_info.value.code == 1
    text = console.export_text()
    assert "tokens [a, b]" in text and "equal [bitwise]" in text
    assert ("FAILED" in text) is not passed
    assert Report.read(tmp_path / "r.json").passed is passed


# --- the command line


def test_the_table_of_commands_matches_the_folder() -> None:
    folder = Path(doctor.__file__).parent
    parts = {"__init__", "bench_drafter"}  # the second is a part of `bench`
    assert {path.stem for path in folder.glob("*.py")} - parts == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        command = cli.main.get_command(click.Context(cli.main), name)
        assert isinstance(command, click.Command)
        for leaf in command.commands.values() if isinstance(command, click.Group) else [command]:
            assert "json_path" in {parameter.name for parameter in leaf.params}


def test_an_unknown_command_is_a_usage_error_naming_the_known_ones() -> None:
    result = run("doktor")
    assert result.exit_code == 2
    assert "no command 'doktor'; there is doctor" in result.output


def test_errors_of_the_package_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RolloutSpecError("draft_length=0: use an integer >= 1")

    monkeypatch.setattr(doctor, "runtime_rows", fail)
    result = run("doctor")
    assert result.exit_code == 2
    assert result.output == "error: draft_length=0: use an integer >= 1\n"


def test_an_unwritable_report_is_refused_before_the_work(tmp_path: Path) -> None:
    result = run("doctor", "--json", tmp_path / "no" / "r.json")
    assert result.exit_code == 2
    assert "not a folder that can be written to" in result.output
    assert "runtime" not in result.output


# --- doctor


def test_doctor_reports_this_machine(tmp_path: Path) -> None:
    result = run("doctor", "--json", tmp_path / "r.json", "--model", checkpoint(tmp_path / "llama", LLAMA))
    assert result.exit_code == 0, result.output
    assert "ready" in result.output
    report = Report.read(tmp_path / "r.json")
    rows = {row["name"]: row for rows in report.results.values() for row in rows}
    assert rows["torch"]["found"] == torch.__version__
    assert rows["int8"]["status"] == "ok"
    assert rows["checkpoint"]["found"].startswith("LlamaForCausalLM")
    assert all(row["status"] == "ok" or row["remedy"] for row in rows.values())


def test_doctor_refuses_a_checkpoint_with_the_reason(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "moe", {**LLAMA, "architectures": ["Qwen3MoeForCausalLM"]})
    result = run("doctor", "--json", tmp_path / "r.json", "--model", folder)
    assert result.exit_code == 1
    assert "not ready: checkpoint" in result.output
    (row,) = Report.read(tmp_path / "r.json").results["model"]
    assert row["status"] == "refused" and "Qwen3MoeForCausalLM" in row["found"]


def prices(tmp_path: Path, *options: str, **config: object) -> dict[str, dict]:
    folder = checkpoint(tmp_path / f"m{len(list(tmp_path.iterdir()))}", LLAMA_8B | config)
    run("doctor", "--json", tmp_path / "r.json", "--model", folder, *options)
    return {row["name"]: row for row in Report.read(tmp_path / "r.json").results["price"]}


def test_doctor_prices_a_self_drafter(tmp_path: Path) -> None:
    dense = prices(tmp_path)
    assert dense["self-drafter B=1"]["found"].startswith("1k: r 0.27, at most 2.45×, 8k: r 0.31")
    assert dense["self-drafter B=32"]["status"] == dense["weights"]["status"] == "ok"
    fp8 = prices(tmp_path, quantization_config={"quant_method": "fp8"})
    assert "1k: r 0.53" in fp8["self-drafter B=1"]["found"] and fp8["weights"]["status"] == "ok"
    narrow = prices(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    assert narrow["weights"]["status"] == narrow["self-drafter B=1"]["status"] == "refused"
    assert "no headroom" in narrow["weights"]["remedy"]
    mixture = prices(tmp_path, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
    assert mixture["experts"]["status"] == "refused" and "experts touched" in mixture["experts"]["remedy"]
    assert "experts" not in dense


def test_doctor_prices_on_a_gpu(tmp_path: Path) -> None:
    assert "H20, predicted: 1." in prices(tmp_path, "--gpu", "H20")["self-drafter B=1"]["found"]
    result = run("doctor", "--gpu", "H20")
    assert result.exit_code == 2 and "--gpu H20: give --model too" in result.output


def test_a_checkpoint_that_tells_too_little_is_not_priced(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", {k: v for k, v in LLAMA_8B.items() if k != "hidden_size"})
    (row,) = (asdict(row) for row in doctor.price_rows(folder, None))
    assert row["status"] == "missing" and "lacks hidden_size" in row["found"]


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    result = run("doctor", "--model", tmp_path)
    assert result.exit_code == 2
    assert "readable config.json" in result.output


@pytest.mark.parametrize("width", [80, 120])
def test_doctor_fits_the_terminal_and_cuts_nothing(width: int) -> None:
    long = doctor.Row(
        "checkpoint", doctor.Status.REFUSED, "architectures=['" + "Z" * 90 + "']", "[use] another"
    )
    console = Console(record=True, width=width)
    console.print(doctor.rows_table({"hardware": list(doctor.hardware_rows()), "model": [long]}))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and text.count("Z") == 90 and "[use]" in text


@pytest.mark.parametrize(
    ("version", "status"),
    [(None, "missing"), ("0.23.1", "refused"), ("0.24.0", "ok"), ("0.31.0+cpu", "ok"), ("0.34.0", "refused")],
)
def test_releases_outside_the_supported_range_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: str | None, status: str
) -> None:
    monkeypatch.setattr(doctor, "distribution_version", lambda *names: version)
    row = doctor.VLLM.row()
    assert row.status.value == status
    assert ("vllm>=0.24,<0.34" in row.remedy) is (status != "ok")


def test_trl_beside_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"verl": "0.9.1", "trl": "1.16.0"}
    monkeypatch.setattr(doctor, "distribution_version", lambda *names: versions.get(names[0]))
    rows = {row.name: row for row in doctor.integration_rows()}
    assert rows["TRL"].status is doctor.Status.REFUSED
    del versions["verl"]
    rows = {row.name: row for row in doctor.integration_rows()}
    assert rows["TRL"].status is doctor.Status.OK


def test_an_old_cpu_gets_told_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_model", lambda: ("Old", ("avx2",)))
    rows = {row.name: row for row in doctor.hardware_rows()}
    assert rows["bf16 products"].status is doctor.Status.MISSING
    assert "float32" in rows["bf16 products"].remedy


def test_cuda_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "H200", 139 << 30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    rows = {row.name: row for row in doctor.hardware_rows()}
    assert rows["cuda:0"].found == "H200, 139 GiB, sm_90"


def test_a_kernel_that_breaks_is_a_row_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    from rollout_spec.drafters import quantize

    def broken(*arguments: object) -> str:
        raise OSError("libbitsandbytes.so: no such file")

    monkeypatch.setattr(quantize.QUANTIZERS["nf4"], "unavailable", broken)
    row = next(row for row in doctor.drafter_rows() if row.name == "nf4")
    assert row.status is doctor.Status.REFUSED
    assert "libbitsandbytes.so" in row.found
