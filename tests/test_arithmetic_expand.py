"""The expanded checkpoints compute the policy's function, with no empty block in any matrix."""

import random
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "arithmetic"
sys.path.insert(0, str(EXAMPLE))

from expand import SIZES, Shape, expand  # noqa: E402
from problems import sample, solve  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

POLICY = EXAMPLE / "policy"
SMALL = Shape(hidden=384, layers=9, heads=12, kv_heads=3, intermediate=704, vocab=1024)
LOGPROB_ERROR = 5e-4  # largest absolute difference of a log-probability in fp32
PAD_PROBABILITY = 1e-6  # of all rows of the padded vocabulary together
BLOCK = 64


@pytest.fixture(scope="module", params=[SMALL, SIZES["100m"]], ids=["small", "100m"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expanded")
    expand(POLICY, folder, request.param, dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def texts():
    """Token ids of held-out problems with a worked solution."""
    rng = random.Random(9)
    return [torch.tensor([list((p.prompt + solve(p, rng)).encode())]) for p in sample(10, 9, "test")]


@torch.inference_mode()
def log_probabilities(model, texts) -> torch.Tensor:
    """(positions, vocabulary) over all texts."""
    return torch.cat([model(input_ids=ids).logits[0].float().log_softmax(-1) for ids in texts])


@pytest.fixture(scope="module")
def expected(texts):
    return log_probabilities(AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval(), texts)


def test_log_probabilities_are_those_of_the_policy(model, texts, expected):
    logprobs = log_probabilities(model, texts)
    vocab = expected.shape[1]
    assert (logprobs[:, :vocab] - expected).abs().max() <= LOGPROB_ERROR
    assert logprobs[:, vocab:].exp().sum(-1).max() <= PAD_PROBABILITY


def test_no_block_of_any_matrix_is_empty(model):
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all(), name
        if weight.dim() == 2:
            blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
            assert blocks.square().sum((1, 3)).min() > 0, name


def test_layers_and_heads_are_what_the_configuration_says(model, folder):
    config = model.config
    assert not config.tie_word_embeddings
    assert len(model.model.layers) == config.num_hidden_layers == len(config.layer_types)
    assert config.num_attention_heads > 4
    assert AutoTokenizer.from_pretrained(folder).encode("3+4=") == list(b"3+4=")


def test_bf16_stays_close_to_the_policy(tmp_path, texts, expected):
    expand(POLICY, tmp_path, SMALL, seed=1, dtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logprobs = log_probabilities(model.float().eval(), texts)
    divergence = (expected.exp() * (expected - logprobs[:, : expected.shape[1]])).sum(-1)
    assert divergence.mean() <= 1e-3


def test_the_seed_decides_the_weights(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1)):
        expand(POLICY, folder, SMALL, seed=seed)
    a, b, c = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("size", "dtype", "fault"),
    [
        ("9b", "bf16", "size is '9b'"),
        ("100m", "fp16", "dtype is 'fp16'"),
        (Shape(hidden=192, layers=9, heads=12, kv_heads=3, intermediate=704), "bf16", "hidden is 192"),
        (Shape(hidden=384, layers=9, heads=3, kv_heads=3, intermediate=704), "bf16", "heads is 3"),
        (Shape(hidden=384, layers=9, heads=7, kv_heads=3, intermediate=704), "bf16", "heads is 7"),
    ],
)
def test_a_size_that_cannot_hold_the_policy_is_named(size, dtype, fault, tmp_path):
    with pytest.raises(ValueError, match=fault):
        expand(POLICY, tmp_path, size, dtype=dtype)
