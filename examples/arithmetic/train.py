"""Train the arithmetic policy from scratch: a small Qwen3 that loads in Hugging Face transformers.

    python examples/arithmetic/train.py --out examples/arithmetic/policy

It ends after `--steps` or `--minutes`, whichever comes first (the learning rate follows whichever is nearer its
end), or at the first check whose held-out accuracy at temperature 1 reaches `--stop-at`: the policy is meant to
leave reinforcement learning something to learn. Weights are rounded to bf16 before the last measurement, so the
figures in PROVENANCE.json are those of the file that is shipped.
"""

import argparse
import copy
import json
import math
import platform
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from measure import POLICY, respond, summarize
from problems import Problem, sample, solve
from tokenizer import EOS, PAD, VOCAB, build_tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

WARMUP = 100
WEIGHT_DECAY = 0.05
MICRO_BATCH_TOKENS = 1024  # small enough to stay in a core's cache
POSITIONS = 1024
LONG = 10  # operands


def build_model() -> Qwen3ForCausalLM:
    """2.4 M parameters in fp32."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen3ForCausalLM(config)


def encode(problem: Problem, rng: random.Random) -> tuple[list[int], int]:
    """Token ids of prompt, one worked solution and the end token; and the length of the prompt."""
    text = problem.prompt + solve(problem, rng)
    return [*text.encode("ascii"), EOS], len(problem.prompt)


def micro_batches(rows: list[tuple[list[int], int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded (ids_BT, labels_BT) of rows of like length; labels are -100 on prompts and padding."""
    groups, size = [[]], 0
    for row in sorted(rows, key=lambda row: len(row[0])):
        if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > MICRO_BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    batches = []
    for group in groups:
        size = max(len(ids) for ids, _ in group)
        ids_BT = torch.full((len(group), size), PAD)
        labels_BT = torch.full((len(group), size), -100)
        for i, (ids, prompt) in enumerate(group):
            ids_BT[i, : len(ids)] = torch.tensor(ids)
            labels_BT[i, prompt : len(ids)] = torch.tensor(ids[prompt:])
        batches.append((ids_BT, labels_BT))
    return batches


def train_step(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, rows: list[tuple[list[int], int]]
) -> float:
    """One update; returns the mean cross-entropy per response token, in nats."""
    tokens = sum(len(ids) - prompt for ids, prompt in rows)
    total = 0.0
    for ids_BT, labels_BT in micro_batches(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        loss = F.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum"
        )
        (loss / tokens).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / tokens


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up, then cosine down to a hundredth of the peak as `progress` goes from 0 to 1."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def held_out(model: Qwen3ForCausalLM, n: int, seed: int, temperature: float) -> dict:
    problems = sample(n, seed, "test")
    model.eval()
    responses = respond(model, build_tokenizer(POSITIONS), [p.prompt for p in problems], temperature, seed)
    model.train()
    return summarize(problems, responses)


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Weights in bf16, configuration and tokenizer, in the Hugging Face layout."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=EOS, pad_token_id=PAD
    )
    model.save_pretrained(folder)
    build_tokenizer(POSITIONS).save_pretrained(folder)


def train(args: argparse.Namespace) -> tuple[Qwen3ForCausalLM, dict]:
    """The trained model in fp32, and what is to be known about the run."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = Qwen3ForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else build_model()
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    start, tokens, trained, recent = time.time(), 0, 0, []
    for step in range(args.steps):
        minutes = (time.time() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, args.lr)
        problems = sample(args.problems, args.seed * args.steps + step, "train")
        problems = [p for p in problems if len(p.operands) < LONG or rng.random() < args.keep_long]
        rows = [encode(problem, rng) for problem in problems]
        trained += len(rows)
        tokens += sum(len(ids) for ids, _ in rows)
        recent = [*recent[-99:], train_step(model, optimizer, rows)]
        done = step + 1
        if done % 50 == 0:
            print(
                f"step {done} loss {sum(recent[-50:]) / 50:.4f} {tokens / 1e6:.2f} M tokens {minutes:.1f} min",
                flush=True,
            )
        if done % args.check == 0:
            save(model, args.out)
            figures = held_out(model, 128, 10**6 + done, 1.0)
            print(f"step {done} held out {json.dumps(figures)}", flush=True)
            if figures["accuracy"] >= args.stop_at:
                break
    run = {
        "steps": done,
        "training_tokens": tokens,
        "training_problems": trained,
        "training_minutes": round((time.time() - start) / 60, 1),
        "final_loss_nats": round(sum(recent) / len(recent), 4),
    }
    return model, run


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the arithmetic policy from scratch.")
    parser.add_argument("--out", type=Path, default=POLICY, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="limit of wall time for the updates")
    parser.add_argument("--problems", type=int, default=16, help="problems per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", type=Path, help="folder of a checkpoint to go on from, instead of from scratch"
    )
    parser.add_argument("--keep-long", type=float, default=1.0, help="share of the long chains to train on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", type=int, default=1000, help="steps between held-out checks")
    parser.add_argument(
        "--stop-at", type=float, default=0.72, help="held-out accuracy that ends the training"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, run = train(args)
    save(model, args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    provenance = {
        "command": "python " + " ".join(sys.argv),
        "seed": args.seed,
        **run,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_temperature_1": held_out(model, 400, 2, 1.0),
        "held_out_greedy": held_out(model, 400, 2, 0.0),
        "machine": f"{platform.machine()} CPU, {args.threads} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(json.dumps(provenance, indent=1))


if __name__ == "__main__":
    main()
