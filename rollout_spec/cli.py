"""`rollout-spec`: finds a command, runs it, and turns the package's own errors into one line.

Commands live in `rollout_spec/commands/<name>.py` and are imported only when they run, so that help is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from rollout_spec import __version__
from rollout_spec.contracts import RolloutSpecError

COMMANDS = {
    "doctor": "Say what runs on this machine, what is refused, and what to do about it.",
    "verify": "Prove on your own model and machine that speculation changes nothing but time.",
    "demo": "Roll a policy out plainly and speculatively, live: the same tokens, in less time.",
    "bench": "Measure, in pairs, how much faster than what one would use otherwise.",
    "calibrate": "Measure what passes of a model cost here, for the automatic policy.",
    "drafter": "Train a one-layer drafter of a policy from its own rollouts, evaluate it, export it to vLLM.",
    "report": "Sum up and draw a recorded rollout: where its time went, and what speculation really saved.",
    "simulate": "Predict what a speculation policy would make of a rollout, without a model.",
}


class _LazyGroup(click.Group):
    """Lists `COMMANDS` without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"rollout_spec.commands.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            ctx.fail(f"no command {args[0]!r}; there is {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RolloutSpecError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rollout-spec")
def main() -> None:
    """Exact speculative-decoding rollouts for RL.

    Exit status: 0, 1 if a check failed, 2 if the request cannot be honoured.
    """


if __name__ == "__main__":
    main()
