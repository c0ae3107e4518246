"""A trainer's first ten minutes with the rollout engine, on the small arithmetic policy. Runs on any CPU.

    python examples/quickstart.py

One GRPO step: sample groups, score them, update the policy, hand the new weights to the engine. Then what else
a trainer asks of an engine: streams, interruption, statistics.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rollout_spec import Completion, RolloutEngine, SamplingParams

ARITHMETIC = Path(__file__).parent / "arithmetic"
sys.path.insert(0, str(ARITHMETIC))

from problems import reward, sample  # noqa: E402

GROUP = 4


def generate_groups(engine: RolloutEngine, problems: list) -> tuple[list[Completion], torch.Tensor]:
    """GROUP samples of every problem, and their rewards [problems, GROUP]."""
    params = SamplingParams(n=GROUP, temperature=1.0, max_tokens=256)
    completions = engine.generate([problem.prompt for problem in problems], params)
    rewards = [reward(problems[row // GROUP], c.text) for row, c in enumerate(completions)]
    return completions, torch.tensor(rewards).view(-1, GROUP)


def train_step(model, optimizer, completions: list[Completion], rewards: torch.Tensor) -> float:
    """One policy-gradient step with group-relative advantages; returns the largest logprob difference seen.

    The engine's logprobs are those of the full policy at temperature 1, so the trainer's own must agree.
    """
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    total = sum(len(c.token_ids) for c in completions)
    difference = 0.0
    for completion, advantage in zip(completions, advantages):
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        start = len(completion.prompt_token_ids)
        logprobs = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, start:, None])[:, 0]
        sampled = torch.tensor(completion.logprobs)
        difference = max(difference, (chosen.detach() - sampled).abs().max().item())
        loss = -(chosen - sampled).exp().mul(advantage).sum() / total
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return difference


async def stream(engine: RolloutEngine, prompt: str) -> None:
    """Completions of one prompt, each as soon as it is finished."""
    async for completion in engine.stream(prompt, SamplingParams(n=GROUP, max_tokens=256)):
        print(f"  sample {completion.index}: {prompt}{completion.text}")


async def interrupt_and_resume(engine: RolloutEngine, prompt: str) -> bool:
    """Abort a request on its way, and go on with it later: the answer is the one it would have had."""
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    (whole,) = engine.generate(prompt, params, request_ids=["whole"])
    request = asyncio.create_task(engine.generate_async(prompt, params, request_id="whole"))
    while not engine.stats().live:
        await asyncio.sleep(0.001)
    engine.abort(["whole"])
    (partial,) = await request
    done = len(partial.token_ids)
    rest = SamplingParams(max_tokens=100 - done, ignore_eos=True)
    (resumed,) = engine.generate([partial.prompt_token_ids + partial.token_ids], rest, request_ids=["whole"])
    print(
        f"  aborted after {done} tokens ({partial.finish_reason.value}), resumed for {len(resumed.token_ids)}"
    )
    return partial.token_ids + resumed.token_ids == whole.token_ids


def main(policy: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    # The drafter is an 8-bit copy of the policy, made here and again at every weight update. Whether it drafts is
    # decided before every pass, from costs that the first start takes a few seconds to measure.
    engine = RolloutEngine.from_pretrained(policy, dtype="float32", seed=0, speculation={"drafter": "int8"})

    print("1. a group of rollouts")
    problems = sample(3, seed=1)
    completions, rewards = generate_groups(engine, problems)
    first = completions[0]
    print(
        f"  {problems[0].prompt}{first.text}   reward {rewards[0, 0]:g}, finished by {first.finish_reason.value}"
    )
    print(f"  logprobs of the first tokens: {[round(x, 3) for x in first.logprobs[:5]]}")
    print(f"  sampled under: {first.version_spans}")
    print(f"  speculation: {first.spec}")
    print(f"  mean reward {rewards.mean():.2f}")

    print("2. a training step, and its weights in the engine")
    difference = train_step(model, optimizer, completions, rewards)
    report = engine.update_weights(model.named_parameters())
    print(f"  trainer and engine disagree about a logprob by {difference:.1e} at most")
    print(f"  version {report.version} in force after {report.seconds:.2f} s, drafter included")
    completions, rewards = generate_groups(engine, problems)
    print(f"  the next rollouts are of version {completions[0].version_spans[0].version}")

    print("3. a stream")
    asyncio.run(stream(engine, problems[1].prompt))

    print("4. an interruption")
    same = asyncio.run(interrupt_and_resume(engine, problems[2].prompt))
    print(f"  {'the same tokens' if same else 'OTHER TOKENS'} as without the interruption")

    print("5. statistics")
    stats = engine.stats()
    print(f"  {stats.finished} completions, {stats.generated_tokens} tokens, policy version {stats.version}")
    print(f"  drafter {stats.drafter}: acceptance {stats.spec.acceptance:.2f}, tau {stats.spec.tau:.2f}")
    print(f"  {stats.verifier} verifier, exactness {stats.exactness}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The rollout engine in ten minutes.")
    parser.add_argument("--policy", type=Path, default=ARITHMETIC / "policy", help="folder of the checkpoint")
    main(parser.parse_args().policy)
