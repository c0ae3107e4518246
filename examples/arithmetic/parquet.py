"""Write arithmetic problems as data sets in verl's parquet format.

    python examples/arithmetic/parquet.py --out data --train 20000 --test 1000

Then point verl's `data.train_files` and `data.val_files` at the files, and its custom reward function at
`compute_score` of problems.py.
"""

import argparse
from pathlib import Path

import pyarrow as pa
from problems import Problem, sample
from pyarrow.parquet import write_table

DATA_SOURCE = "rollout_spec/arithmetic"
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct({"split": pa.string(), "index": pa.int64()}),
    }
)


def row(problem: Problem, index: int) -> dict:
    """One record of SCHEMA."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": problem.prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
        "extra_info": {"split": problem.split, "index": index},
    }


def write(path: Path, n: int, seed: int, split: str) -> None:
    """Write `sample(n, seed, split)` to `path`; its folder is created."""
    rows = [row(problem, i) for i, problem in enumerate(sample(n, seed, split))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write arithmetic problems in verl's parquet format.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--train", type=int, default=20000, help="training problems")
    parser.add_argument("--test", type=int, default=1000, help="held-out problems")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out / "train.parquet", args.train, args.seed, "train")
    write(args.out / "test.parquet", args.test, args.seed, "test")


if __name__ == "__main__":
    main()
