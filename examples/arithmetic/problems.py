"""Arithmetic problems whose worked solutions are chains of equalities, with a reward that checks the answer.

A text is `prompt + response`, and every expression between two `=` has the same value:

    27*43=20*3+7*40+7*3+20*40=60+280+21+800=340+21+800=340+821=1161
    prompt |------------------------- response -------------------|

Each step may be taken in several valid orders (which pair of neighbours to add, in which order to list the
partial products), and `solve` draws one: text sampled at temperature 1 has real entropy. A sum of n terms is
re-written n - 1 times, so lengths grow with n squared and a heavy-tailed n gives the long tail of rollouts:
p99 of the response length is more than ten times its median, and no worked solution exceeds `MAX_RESPONSE`.

This file needs only the standard library. verl can load `compute_score` from it by path.
"""

import math
import random
import zlib
from dataclasses import dataclass

KINDS = ("add", "mul", "chain")
KIND_WEIGHTS = (0.15, 0.25, 0.6)
SPLITS = ("train", "test")
TEST_SHARE = 10  # one problem in ten is held out
CHAIN_MIN, CHAIN_MAX = 3, 18  # terms of a chain
CHAIN_TAIL = 1.8  # Pareto exponent of the number of terms
TERM_MAX = 20  # largest term of a chain
MAX_RESPONSE = 508  # characters, so that a worked solution and its end token fit 512 tokens


@dataclass(frozen=True)
class Problem:
    """`kind` is one of KINDS; `operands` are two positive integers, or CHAIN_MIN..CHAIN_MAX for a chain."""

    kind: str
    operands: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The expression and `=`, e.g. `3+14+7=`."""
        return ("*" if self.kind == "mul" else "+").join(map(str, self.operands)) + "="

    @property
    def answer(self) -> int:
        return math.prod(self.operands) if self.kind == "mul" else sum(self.operands)

    @property
    def split(self) -> str:
        """Held-out or not, by a hash of the problem that ignores the order of its operands."""
        operator = "*" if self.kind == "mul" else "+"
        key = operator.join(map(str, sorted(self.operands)))
        return "test" if zlib.crc32(key.encode()) % TEST_SHARE == 0 else "train"


def sample(n: int, seed: int, split: str = "train") -> list[Problem]:
    """`n` problems of `split`, the same for the same arguments; a problem may repeat within a split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {SPLITS}")
    if n < 0:
        raise ValueError(f"n is {n}; ask for 0 or more problems")
    rng = random.Random(f"{split}/{seed}")
    problems = []
    while len(problems) < n:
        problem = draw(rng)
        if problem.split == split:
            problems.append(problem)
    return problems


def prompts(n: int, seed: int, split: str = "train") -> list[str]:
    """The prompts of `sample(n, seed, split)`, ready for an engine."""
    return [problem.prompt for problem in sample(n, seed, split)]


def draw(rng: random.Random) -> Problem:
    """One problem of either split."""
    kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
    if kind == "add":
        digits = rng.randint(2, 3)
        operands = tuple(rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    elif kind == "mul":
        low, high = (2, 10) if rng.random() < 0.8 else (11, 100)
        operands = (rng.randrange(low, high), rng.randrange(11, 100))
    else:
        n = min(CHAIN_MAX, int(CHAIN_MIN * (1 - rng.random()) ** (-1 / CHAIN_TAIL)))
        operands = tuple(rng.randint(1, TERM_MAX) for _ in range(n))
    return Problem(kind, operands)


def solve(problem: Problem, rng: random.Random) -> str:
    """A worked solution, its valid orders drawn from `rng`: expressions joined by `=`, the answer last."""
    if problem.kind == "chain":
        return "=".join(_add_neighbours(list(problem.operands), rng))
    a, b = (_parts(operand) for operand in problem.operands)
    if problem.kind == "add":
        columns = [a.get(p, 0) + b.get(p, 0) for p in a.keys() | b.keys()]
        rng.shuffle(columns)
        return "=".join([_sum(columns), *_add_neighbours(columns, rng)])
    pairs = [(x, y) for x in a.values() for y in b.values()]
    rng.shuffle(pairs)
    steps = [] if len(pairs) == 1 else ["+".join(f"{x}*{y}" for x, y in pairs)]
    products = [x * y for x, y in pairs]
    return "=".join([*steps, _sum(products), *_add_neighbours(products, rng)])


def _parts(number: int) -> dict[int, int]:
    """The number by decimal place, zeros left out: 307 is {2: 300, 0: 7}."""
    digits = str(number)[::-1]
    return {place: int(d) * 10**place for place, d in enumerate(digits) if d != "0"}


def _sum(terms: list[int]) -> str:
    return "+".join(map(str, terms))


def _add_neighbours(terms: list[int], rng: random.Random) -> list[str]:
    """The expressions after each addition of two random neighbours, down to one number."""
    terms, steps = list(terms), []
    while len(terms) > 1:
        i = rng.randrange(len(terms) - 1)
        terms[i : i + 2] = [terms[i] + terms[i + 1]]
        steps.append(_sum(terms))
    return steps


def reward(problem: Problem, response: str) -> float:
    """1.0 if the text after the last `=` of `response` is the exact answer, else 0.0."""
    return score(response, str(problem.answer))


def judge_steps(problem: Problem, response: str) -> list[tuple[int, int, bool]]:
    """The steps of a response up to the first wrong one: characters [start, stop), the end counted as one, and right or not.

    A step is an expression and the `=` behind it, or the end. It is wrong if it has another value than the problem, or
    repeats the step before; so is an end behind anything but a number.
    """
    steps: list[tuple[int, int, bool]] = []
    start, before = 0, problem.prompt[:-1]
    for expression in response.split("="):
        stop = start + len(expression) + 1
        right = expression != before and _value(expression) == problem.answer
        steps.append((start, stop, right))
        if not right:
            return steps
        start, before = stop, expression
    if not before.isdigit():
        steps.append((start - 1, start, False))
    return steps


def _value(expression: str) -> int | None:
    """Of a sum of products of numbers; None for anything else."""
    terms = [term.split("*") for term in expression.split("+")]
    if not all(factor.isascii() and factor.isdigit() for term in terms for factor in term):
        return None
    return sum(math.prod(map(int, term)) for term in terms)


def score(response: str, answer: str) -> float:
    return float(response.rsplit("=", 1)[-1].strip() == answer)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None
) -> float:
    """`reward` with the signature of verl's custom reward functions; `solution_str` is the decoded response."""
    return score(solution_str, str(ground_truth))
