"""The arithmetic example: problems and reward, data sets, tokenizer and the policy that is shipped."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "arithmetic"
sys.path.insert(0, str(EXAMPLE))

import parquet  # noqa: E402
import problems  # noqa: E402
from measure import quantile, respond  # noqa: E402
from problems import Problem, compute_score, prompts, reward, sample, solve  # noqa: E402
from tokenizer import EOS, build_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

POLICY = EXAMPLE / "policy"
PROVENANCE = json.loads((POLICY / "PROVENANCE.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()


def values(response: str) -> set[int]:
    """The values of all expressions of a response, by Python's own arithmetic."""
    return {eval(expression, {"__builtins__": {}}) for expression in response.split("=")}


def test_every_expression_of_a_solution_has_the_value_of_the_problem():
    rng = random.Random(0)
    for problem in sample(1500, 0, "train") + sample(500, 0, "test"):
        response = solve(problem, rng)
        assert values(response) == {problem.answer} == values(problem.prompt[:-1])
        assert reward(problem, response) == 1.0


@pytest.mark.parametrize(
    ("problem", "orders"),
    [
        (Problem("chain", (3, 14, 7, 9)), 6),  # 3! ways to merge neighbours
        (Problem("add", (347, 586)), 6 * 2),  # column sums in 3! orders, then 2 merges
        (Problem("mul", (7, 83)), 2),  # two partial products in either order
        (Problem("mul", (7, 80)), 1),
    ],
)
def test_all_orders_of_a_problem_reach_its_answer(problem, orders):
    responses = {solve(problem, random.Random(seed)) for seed in range(400)}
    assert len(responses) == orders
    assert all(values(response) == {problem.answer} for response in responses)


@pytest.mark.parametrize("response", ["", "17=", "17=25", "17=024", "17=24.", "24=17", "17=24+0", "17=2 4"])
def test_reward_refuses_everything_but_the_exact_answer(response):
    assert reward(Problem("chain", (3, 14, 7)), response) == 0.0


def test_steps_of_solutions_are_right_and_of_others_the_last_is_wrong():
    rng = random.Random(3)
    for problem in sample(500, 5):
        response = solve(problem, rng)
        steps = problems.judge_steps(problem, response)
        assert all(right for _, _, right in steps) and steps[-1][1] == len(response) + 1
        assert "".join((response + ".")[start:stop] for start, stop, _ in steps) == response + "."
        at = rng.randrange(len(response))
        if response[at].isdigit():  # one digit changed: the step it is in is the first wrong one
            other = str((int(response[at]) + rng.randint(1, 9)) % 10)
            changed = problems.judge_steps(problem, response[:at] + other + response[at + 1 :])
            *before, (start, stop, right) = changed
            assert start <= at < stop and not right and changed[: len(before)] == steps[: len(before)]


@pytest.mark.parametrize(
    ("response", "last"),
    [
        ("17+7=25", (5, 8)),  # the last step, and the end behind it
        ("18+7=24", (0, 5)),
        ("17+7=17+7=24", (5, 10)),  # no progress
        ("17+7", (4, 5)),  # the end came too early
        ("17+7=", (5, 6)),
        ("", (0, 1)),
        ("17++7=24", (0, 6)),
        ("17+x=24", (0, 5)),
    ],
)
def test_where_a_response_first_goes_wrong(response, last):
    steps = problems.judge_steps(Problem("chain", (3, 14, 7)), response)
    assert steps[-1] == (*last, False) and all(right for _, _, right in steps[:-1])


def test_compute_score_is_the_reward_as_verl_calls_it():
    assert compute_score("any", "17+7=24", "24", extra_info={"index": 0}) == 1.0
    assert compute_score("any", "17+7=25", "24") == 0.0


def test_lengths_have_a_long_tail():
    rng = random.Random(1)
    lengths = [len(solve(problem, rng)) + 1 for problem in sample(5000, 1)]
    assert 15 <= quantile(lengths, 0.5) <= 45
    assert quantile(lengths, 0.99) >= 10 * quantile(lengths, 0.5)


def test_the_longest_problem_fits_the_limit():
    longest = Problem("chain", (problems.TERM_MAX,) * problems.CHAIN_MAX)
    lengths = [len(solve(longest, random.Random(seed))) for seed in range(300)]
    assert max(lengths) <= problems.MAX_RESPONSE


def test_splits_share_no_problem_even_with_operands_swapped():
    keys = {
        split: {(p.kind == "mul", tuple(sorted(p.operands))) for p in sample(4000, 2, split)}
        for split in problems.SPLITS
    }
    assert not keys["train"] & keys["test"]


def test_sampling_repeats_for_the_same_seed_only():
    assert sample(50, 3) == sample(50, 3)
    assert sample(50, 3) != sample(50, 4)
    assert prompts(50, 3) == [problem.prompt for problem in sample(50, 3)]


@pytest.mark.parametrize(("n", "split", "fault"), [(1, "valid", "'valid'"), (-1, "train", "-1")])
def test_sample_names_the_bad_argument(n, split, fault):
    with pytest.raises(ValueError, match=fault):
        sample(n, 0, split)


def test_parquet_files_read_back_as_the_problems(tmp_path, monkeypatch):
    arguments = [
        "parquet.py",
        "--out",
        str(tmp_path / "data"),
        "--train",
        "40",
        "--test",
        "10",
        "--seed",
        "5",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    parquet.main()
    for split, n in (("train", 40), ("test", 10)):
        table = parquet.pa.parquet.read_table(tmp_path / "data" / f"{split}.parquet")
        assert table.schema.equals(parquet.SCHEMA)
        for i, (row, problem) in enumerate(zip(table.to_pylist(), sample(n, 5, split), strict=True)):
            assert row["prompt"] == [{"role": "user", "content": problem.prompt}]
            assert row["extra_info"] == {"split": split, "index": i}
            answer = row["reward_model"]["ground_truth"]
            assert compute_score(row["data_source"], solve(problem, random.Random(i)), answer) == 1.0


def test_tokenizer_maps_ascii_to_its_codes_and_joins_texts(tokenizer):
    rng = random.Random(6)
    for problem in sample(100, 6):
        response = solve(problem, rng)
        ids = tokenizer(problem.prompt)["input_ids"]
        assert ids + tokenizer.encode(response) == tokenizer.encode(problem.prompt + response)
        assert ids == list(problem.prompt.encode("ascii"))
        assert tokenizer.decode(tokenizer.encode(response)) == response
    text = "Any ASCII, too:\n\t{} <|x|> ."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]
    assert tokenizer.decode([*b"=24", EOS], skip_special_tokens=True) == "=24"


def test_shipped_tokenizer_is_the_one_that_is_built(tokenizer):
    built = build_tokenizer(tokenizer.model_max_length)
    assert tokenizer.is_fast
    assert tokenizer.get_vocab() == built.get_vocab()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (built.eos_token_id, built.pad_token_id)


def test_chat_template_adds_nothing(tokenizer):
    messages = [{"role": "user", "content": "3+14="}]
    for tokenize in (False, True):
        text = tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=True, return_dict=False
        )
        assert text == (tokenizer.encode("3+14=") if tokenize else "3+14=")


def test_checkpoint_is_the_small_qwen3_that_is_claimed(model):
    config = model.config
    assert sum(f.stat().st_size for f in POLICY.iterdir()) <= 12e6
    assert (config.model_type, config.tie_word_embeddings, config.head_dim) == ("qwen3", True, 64)
    assert (config.vocab_size, config.eos_token_id, config.max_position_embeddings) == (128, EOS, 1024)
    assert sum(p.numel() for p in model.parameters()) == PROVENANCE["parameters"]
    stored = AutoModelForCausalLM.from_pretrained(POLICY)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_provenance_leaves_reinforcement_learning_something_to_learn():
    sampled, greedy = PROVENANCE["held_out_temperature_1"], PROVENANCE["held_out_greedy"]
    assert min(sampled["n"], greedy["n"]) >= 300
    assert 0.4 <= sampled["accuracy"] <= 0.8
    assert sampled["accuracy"] < greedy["accuracy"] < 1
    assert sampled["unended"] < 0.02
    assert sampled["length_p99"] >= 10 * sampled["length_median"]


def test_policy_measures_as_its_provenance_says(model, tokenizer):
    claimed = PROVENANCE["held_out_temperature_1"]["accuracy"]
    held_out = sample(64, 77, "test")
    responses = respond(model, tokenizer, [problem.prompt for problem in held_out], seed=77)
    right = sum(reward(problem, response.text) for problem, response in zip(held_out, responses))
    spread = math.sqrt(claimed * (1 - claimed) / len(held_out))
    assert abs(right / len(held_out) - claimed) <= 4 * spread
    assert sum(response.ended for response in responses) >= 61


def test_policy_has_entropy_at_temperature_1(model, tokenizer):
    prompt = "3+14+7+9+12="
    responses = respond(model, tokenizer, [prompt] * 16, seed=3)
    assert len({response.text for response in responses}) >= 8
