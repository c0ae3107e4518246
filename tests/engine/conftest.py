"""A tiny random policy for what does not need a trained one: fast, sharp enough to be predictable."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rollout_spec import RolloutEngine
from rollout_spec.drafters.quantize import available_quantizers, usual_quantizer

VOCAB, EOS = 61, 1
DRAFTER = usual_quantizer("cpu", torch.float32)  # for tests that do not care which
KINDS = [k for k, lacks in available_quantizers("cpu", torch.float32).items() if not lacks and k != "dense"]


class CharTokenizer:
    """Token i is the character chr(33 + i): enough of a tokenizer for prompts and stop strings."""

    all_special_tokens = ("<end>",)

    def __call__(self, text):
        return {"input_ids": [ord(character) - 33 for character in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(33 + int(token)) for token in tokens)


def make_model(seed=0, **overrides):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**(sizes | overrides), eos_token_id=EOS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def make_engine(model):
    """An engine on the tiny model; options as for EngineConfig, `speculation` as a dict or a drafter's name."""

    def make(policy=None, speculation=DRAFTER, version=0, **options):
        if isinstance(speculation, str):
            speculation = {"drafter": speculation}
        speculation = {"canary_min_acceptance": 0.0, "draft_length": 4} | speculation
        options = {"dtype": "float32", "block_size": 16, "max_num_seqs": 32} | options
        return RolloutEngine.from_model(
            policy if policy is not None else model, speculation=speculation, tokenizer=CharTokenizer(), version=version,
            **options,
        )  # fmt: skip

    return make


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture(scope="session")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCAB, (3 + 5 * row,), generator=generator).tolist() for row in range(6)]
