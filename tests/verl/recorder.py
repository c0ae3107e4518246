"""Imported by every process of a verl run under test (`VERL_USE_EXTERNAL_MODULES`): writes down what its engine does.

Into the folder `$RECORD`, one file per process: every answer as verl gets it, the weights of every version, the counts
of the engine. `$SLOW` makes every step of the engine last so many seconds, so that weight updates meet answers on their way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rollout_spec.integrations.after_import import after_import

FOLDER = Path(os.environ["RECORD"])


def append(kind: str, **values: Any) -> None:
    with open(FOLDER / f"{kind}-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def record_answers(module: ModuleType) -> None:
    convert = module.to_token_output

    def to_token_output(completion: Any, *rest: Any) -> dict[str, Any]:
        fields = convert(completion, *rest)
        append("answers", prompt=completion.prompt_token_ids, request_id=completion.request_id, **fields)
        return fields

    module.to_token_output = to_token_output


def record_engine(module: ModuleType) -> None:
    from safetensors.torch import save_file

    engine = module.RolloutEngine
    update, generate = engine.update_weights, engine.generate_async

    def update_weights(self: Any, weights: Any, version: int) -> Any:
        received = {}

        def keep() -> Iterator[tuple[str, Any]]:
            for name, tensor in weights:
                received[name] = tensor.clone()
                yield name, tensor

        report = update(self, keep(), version)
        save_file(received, FOLDER / f"weights-{os.getpid()}-{version}.safetensors")
        append("updates", version=version, drafter=self.stats().drafter)
        return report

    async def generate_async(self: Any, *arguments: Any, **named: Any) -> Any:
        completions = await generate(self, *arguments, **named)
        spec = self.stats().spec
        append("counts", drafted=spec.drafted, accepted=spec.accepted, verify_steps=spec.verify_steps)
        return completions

    advance = engine._advance

    def slow_advance(self: Any) -> None:
        time.sleep(float(os.environ.get("SLOW", 0)))
        advance(self)

    engine.update_weights, engine.generate_async, engine._advance = (
        update_weights,
        generate_async,
        slow_advance,
    )


after_import("rollout_spec.integrations.verl.conversions", record_answers)
after_import("rollout_spec.engine", record_engine)
