"""Measure a policy on arithmetic problems: accuracy, response lengths, responses that never end.

python examples/arithmetic/measure.py --n 300 --temperature 1
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from problems import SPLITS, Problem, reward, sample
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

POLICY = Path(__file__).parent / "policy"
MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Response:
    """`text` without the end token; `length` in tokens, the end token included; `ended` if it was emitted."""

    text: str
    length: int
    ended: bool


@torch.inference_mode()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = 64,
) -> list[Response]:
    """One response per prompt, in order; temperature 0 is greedy. Prompts of like length share a batch."""
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, padding_side="left")
        output_BT = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        for i, ids in zip(rows, output_BT[:, inputs["input_ids"].shape[1] :].tolist()):
            ended = tokenizer.eos_token_id in ids
            length = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
            responses[i] = Response(tokenizer.decode(ids[: length - ended]), length, ended)
    return [responses[i] for i in range(len(prompts))]


def quantile(values: list[int], q: float) -> int:
    """The smallest value that at least a share `q` of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-q * len(ordered) // 1) - 1)]


def summarize(problems: list[Problem], responses: list[Response]) -> dict:
    """Accuracy (in all and by kind), response length in tokens, and the share of responses that never ended."""
    rewards = [reward(p, r.text) for p, r in zip(problems, responses, strict=True)]
    lengths = [r.length for r in responses]
    by_kind = {}
    for problem, value in zip(problems, rewards):
        by_kind.setdefault(problem.kind, []).append(value)
    return {
        "n": len(problems),
        "accuracy": round(sum(rewards) / len(rewards), 4),
        "accuracy_by_kind": {kind: round(sum(v) / len(v), 4) for kind, v in sorted(by_kind.items())},
        "length_median": quantile(lengths, 0.5),
        "length_p90": quantile(lengths, 0.9),
        "length_p99": quantile(lengths, 0.99),
        "length_max": max(lengths),
        "length_mean": round(sum(lengths) / len(lengths), 1),
        "unended": round(sum(not r.ended for r in responses) / len(responses), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a policy on arithmetic problems.")
    parser.add_argument("--policy", type=Path, default=POLICY, help="folder of the checkpoint")
    parser.add_argument("--n", type=int, default=300, help="problems")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of the sampling")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    model = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32).eval()
    problems = sample(args.n, args.seed, args.split)
    responses = respond(model, tokenizer, [p.prompt for p in problems], args.temperature, args.seed)
    print(json.dumps(summarize(problems, responses), indent=1))


if __name__ == "__main__":
    main()
