"""Bad input gets an error that names the field, the value and the remedy, and leaves the engine as it was."""

import asyncio
import json
import math
import pickle
import threading

import numpy as np
import pytest
import torch

from rollout_spec import RolloutEngine, SamplingParams
from rollout_spec.contracts import InvalidRequest, RolloutSpecError, UnsupportedModel, WeightError
from rollout_spec.engine import EngineAsleep

from .conftest import DRAFTER, VOCAB, make_model

PARAMS = SamplingParams(n=2, max_tokens=12)
IDS = list("abcdef")


class Usable:
    """An engine, and what it answered before anything went wrong."""

    def __init__(self, engine, prompts):
        self.engine, self.prompts = engine, prompts
        self.before = self.answers()

    def answers(self):
        return [c.token_ids for c in self.engine.generate(self.prompts, PARAMS, request_ids=IDS)]

    def check(self):
        stats = self.engine.stats()
        assert stats.live == stats.waiting == 0 and stats.kv_tokens_free == stats.kv_tokens
        assert not self.engine._live
        assert self.answers() == self.before
        assert self.engine.stats().drafter == DRAFTER and not self.engine.stats().reports


@pytest.fixture(scope="module")
def usable(make_engine, prompts):
    return Usable(
        make_engine(kv_cache_tokens=512, speculation={"drafter": DRAFTER, "draft_length": 3}), prompts
    )


def refused(error, *words):
    """A context in which `error` is raised with all of `words` in its message."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*(?:{word}))" for word in words))


# --- requests ---------------------------------------------------------------------------------------------

GOOD = [2, 3, 4]
REQUESTS = {
    "no tokens": ({"prompts": [GOOD, []]}, r"prompts\[1\]=\[\]", "at least one token"),
    "no text": ({"prompts": ""}, r"prompts\[0\]=\[\]", "at least one token"),
    "token id beyond the vocabulary": ({"prompts": [[2, VOCAB]]}, rf"prompts\[0\]={VOCAB}", r"in \[0, 61\)"),
    "negative token id": ({"prompts": [GOOD, [-1]]}, r"prompts\[1\]=-1", r"in \[0, 61\)"),
    "text beyond the vocabulary": ({"prompts": "ab\x7f"}, r"prompts\[0\]=\d", r"in \[0, 61\)"),
    "floats": ({"prompts": [[2.0, 3.0]]}, r"prompts\[0\]=\[2.0, 3.0\]", "integer token ids"),
    "one list of floats": ({"prompts": [2.5, 3.5]}, r"prompts\[0\]=2.5", "integer token ids"),
    "bools": ({"prompts": [[True, False]]}, r"prompts\[0\]=\[True, False\]", "integer token ids"),
    "nested": ({"prompts": [[[2, 3]]]}, r"prompts\[0\]=\[\[2, 3\]\]", "flat list"),
    "ragged": ({"prompts": [[2, [3]]]}, r"prompts\[0\]=\[2, \[3\]\]", "flat list"),
    "too large for int64": ({"prompts": [[2**70]]}, r"prompts\[0\]", "integer token ids"),
    "a list of text": ({"prompts": [["AB"]]}, r"prompts\[0\]=\['AB'\]", "integer token ids"),
    "no prompts at all": ({"prompts": None}, "prompts=None", "give a list"),
    "a number": ({"prompts": 7}, "prompts=7", "give a list"),
    "a mapping": ({"prompts": {"prompt": "A"}}, "prompts=", "give a list"),
    "None among prompts": ({"prompts": [GOOD, None]}, r"prompts\[1\]=None", "integer token ids"),
    "prompt as long as the context": ({"prompts": [[2] * 256]}, "256 tokens", "holds 256", "shorten"),
    "seeds of the wrong length": ({"prompts": [GOOD, GOOD], "seeds": [1]}, "seeds: 1 given for 2", "one per prompt"),
    "a seed that is no integer": ({"prompts": [GOOD], "seeds": [1.5]}, r"seed=1.5", "64-bit integer"),
    "one seed instead of a list": ({"prompts": [GOOD], "seeds": 4}, "seeds=4", "give a list"),
    "params of the wrong length": (
        {"prompts": [GOOD], "params": [PARAMS, PARAMS]}, "sampling_params: 2 given for 1", "one per prompt",
    ),
    "params as a dict": ({"prompts": [GOOD], "params": {"n": 1}}, r"sampling_params=\{'n': 1\}", "SamplingParams"),
    "None among params": ({"prompts": [GOOD], "params": [None]}, r"sampling_params\[0\]=None", "from_dict"),
    "n of zero": ({"prompts": [GOOD], "n": 0}, "n=0", "between 1 and 65536"),
    "n as text": ({"prompts": [GOOD], "n": "two"}, "n='two'", "between 1 and 65536"),
    "ids of the wrong length": ({"prompts": [GOOD], "request_ids": ["a", "b"]}, "request_ids: 2 given for 1", "one per"),
    "the same id twice": ({"prompts": [GOOD, GOOD], "request_ids": ["a", "a"]}, r"\['a', 'a'\]", "distinct"),
    "ids that are no strings": ({"prompts": [GOOD, GOOD], "request_ids": ["a", 3]}, r"request_ids\[1\]=3", "use a string"),
    "ids that cannot be hashed": ({"prompts": [GOOD], "request_ids": [["a"]]}, r"request_ids\[0\]=\['a'\]", "a string"),
    "an id that cannot be encoded": ({"prompts": [GOOD], "request_ids": ["\ud800"]}, r"request_ids\[0\]=", "printable"),
    "text instead of ids": ({"prompts": [GOOD], "request_ids": "a"}, "request_ids='a'", "give a list"),
    "special token as a stop string": (
        {"prompts": [GOOD], "params": SamplingParams(stop=["A", "A<end>"])}, "stop='A<end>'", "use stop_token_ids",
    ),
    "stop token beyond the vocabulary": (
        {"prompts": [GOOD], "params": SamplingParams(stop_token_ids=[VOCAB])}, f"stop_token_ids={VOCAB}", r"in \[0, 61\)",
    ),
    "biased token beyond the vocabulary": (
        {"prompts": [GOOD], "params": SamplingParams(logit_bias={5000: 1})}, "logit_bias=5000", r"in \[0, 61\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REQUESTS.values(), ids=REQUESTS.keys())
def test_bad_requests(usable, case):
    arguments, *words = case
    arguments = dict(arguments)
    with refused(InvalidRequest, *words):
        usable.engine.generate(arguments.pop("prompts"), arguments.pop("params", PARAMS), **arguments)
    usable.check()


def test_a_good_prompt_beside_a_bad_one_is_not_started(usable):
    counts = usable.engine.stats().finished
    with pytest.raises(InvalidRequest):
        usable.engine.generate([GOOD, [999]], PARAMS)
    assert usable.engine.stats().finished == counts
    usable.check()


def test_streams_refuse_the_same(usable):
    with refused(InvalidRequest, r"prompts\[0\]=\[\]", "at least one token"):
        asyncio.run(usable.engine.generate_async([], PARAMS))
    with refused(InvalidRequest, r"sampling_params\[0\]|sampling_params=", "SamplingParams"):
        asyncio.run(usable.engine.generate_async(GOOD, {"n": 2}))
    with refused(InvalidRequest, r"request_ids\[0\]=7", "use a string"):
        asyncio.run(usable.engine.generate_async(GOOD, PARAMS, request_id=7))
    usable.check()


def test_no_memory_for_one_request(make_engine, prompts):
    tight = Usable(make_engine(kv_cache_tokens=64), [prompts[0], prompts[1]] * 3)
    with refused(InvalidRequest, "max_tokens=60", "prompt of 10 tokens", "holds 64", "raise kv_cache_tokens"):
        tight.engine.generate([[2] * 10], SamplingParams(max_tokens=60))
    with refused(InvalidRequest, "prompt of 64 tokens", "holds 64", "raise kv_cache_tokens"):
        tight.engine.generate([[2] * 64])
    tight.check()
    (completion,) = tight.engine.generate([[2] * 60], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(completion.token_ids) == 4


def test_a_limit_past_the_context_is_the_contexts_end_however_large_the_cache(make_engine):
    """`max_tokens=4096` must not be refused just because the cache holds exactly one context."""
    for tokens in (48, 512):
        engine = make_engine(kv_cache_tokens=tokens, max_model_len=48)
        for limit in (45, 46, 300, 2**31 - 1):
            (completion,) = engine.generate([GOOD], SamplingParams(max_tokens=limit, ignore_eos=True))
            assert len(completion.token_ids) == 45


def test_text_needs_a_tokenizer(model):
    engine = RolloutEngine.from_model(model, speculation={"drafter": "none"}, dtype="float32", max_num_seqs=2)
    with refused(InvalidRequest, r"prompts\[0\]='AB'", "no tokenizer; give token ids"):
        engine.generate("AB")
    with refused(InvalidRequest, r"stop=\('x',\)", "no tokenizer; use stop_token_ids"):
        engine.generate([GOOD], SamplingParams(stop=["x"]))
    (completion,) = engine.generate([GOOD], SamplingParams(max_tokens=2, ignore_eos=True))
    assert completion.text == "" and len(completion.token_ids) == 2


def test_ids_in_flight(usable):
    engine = usable.engine

    async def twice():
        stream = engine.stream(GOOD, SamplingParams(n=2, max_tokens=40, ignore_eos=True), request_id="busy")
        await anext(stream)
        with engine._changed:
            engine._submit(*engine._reader.read([GOOD], PARAMS, None, None, ["busy too"]))
            with refused(InvalidRequest, "request_ids='busy too'", "in flight already; use another id"):
                engine.generate([GOOD, GOOD], PARAMS, request_ids=["new", "busy too"])
            assert "new" not in engine._live
            with refused(InvalidRequest, "request_ids='nobody'", "not in flight"):
                engine.abort(["busy too", "nobody"])
            assert "busy too" in engine._live  # a refused abort aborts nothing
            engine.abort(["busy too", "busy too"])
        await stream.aclose()

    asyncio.run(twice())
    usable.check()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["nobody"], ("request_ids='nobody'", "not in flight; pass ids")),
        ("nobody", ("request_ids='nobody'", "give a list")),
        ([None], (r"request_ids\[0\]=None", "use a string")),
        (3, ("request_ids=3", "give a list")),
    ],
)
def test_aborting_what_is_not_there(usable, ids, words):
    with refused(InvalidRequest, *words):
        usable.engine.abort(ids)
    usable.check()


def test_the_engines_own_ids_never_meet_a_callers(usable):
    engine = usable.engine
    (own,) = engine.generate([GOOD], SamplingParams(max_tokens=4))
    place, count = own.request_id.rsplit("-", 1)
    taken = f"{place}-{int(count) + 1}"
    with engine._changed:
        ((mine,),) = engine._submit(
            *engine._reader.read([GOOD], SamplingParams(max_tokens=4), None, None, [taken])
        )
        ((other,),) = engine._submit(
            *engine._reader.read([GOOD], SamplingParams(max_tokens=4), None, None, None)
        )
        assert mine.request_id == taken != other.request_id
    while mine.finish_reason is None or other.finish_reason is None:
        engine._advance()
    usable.check()


def test_the_engines_own_id_replays_a_sample(usable):
    params = SamplingParams(n=3, max_tokens=20, seed=5)
    first = usable.engine.generate([GOOD, GOOD], params)
    for row in (0, 3):
        again = usable.engine.generate([GOOD], params, request_ids=[first[row].request_id])
        assert [c.token_ids for c in again] == [c.token_ids for c in first[row : row + 3]]
    usable.check()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.logprobs([]), (r"token_ids=\[\]", "at least one token")),
        (lambda e: e.logprobs([1.5]), (r"token_ids=\[1.5\]", "integer token ids")),
        (lambda e: e.logprobs([5, VOCAB]), (f"token_ids={VOCAB}", r"in \[0, 61\)")),
        (lambda e: e.logprobs([5] * 257), ("257 tokens", "holds 256", "max_model_len")),
        (lambda e: e.sleep(3), ("level=3", "use 1")),
        (lambda e: e.sleep("deep"), ("level='deep'", "use 1")),
    ],
    ids=["empty", "floats", "token id", "too long", "level", "level type"],
)
def test_other_calls(usable, call, words):
    with refused(InvalidRequest, *words):
        call(usable.engine)
    usable.check()


def test_logprobs_without_room(make_engine):
    engine = make_engine(kv_cache_tokens=64)
    with refused(InvalidRequest, "100 tokens", "no room in the KV cache", "raise kv_cache_tokens"):
        engine.logprobs([5] * 100)
    assert len(engine.logprobs([5] * 64)) == 63


@pytest.mark.parametrize("levels", [(1, 2), (2, 1), (2, "wake", 1), (1, 1, "wake", 2)])
def test_weights_once_discarded_stay_so_until_an_update(make_engine, model, levels):
    """A deeper sleep is not ignored, and a lighter one does not make the engine believe it has weights."""
    engine = make_engine()
    for level in levels:
        engine.wake_up() if level == "wake" else engine.sleep(level)
    with refused(EngineAsleep, "asleep", r"wake_up\(\)"):
        engine.generate([GOOD])
    engine.wake_up()
    with refused(EngineAsleep, "no weights", r"update_weights\(\)"):
        engine.generate([GOOD])
    with refused(EngineAsleep, "no weights", r"update_weights\(\)"):
        engine.logprobs(GOOD)
    engine.update_weights(model.named_parameters())
    assert engine.generate([GOOD], SamplingParams(max_tokens=2))


# --- sampling values --------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
SAMPLING = [
    ("n", [0, -1, 65537, 1.0, NAN, INF, "1", None, True, [1]]),
    ("temperature", [NAN, INF, -INF, -0.1, 1e5, 1e-5, "1", None, True, 1j]),
    ("top_k", [-2, 2**31, 1.0, NAN, "1", None, True]),
    ("top_p", [0, 0.0, -0.1, 1.0001, NAN, INF, "1", None, True]),
    ("min_p", [-1e-9, 1.5, NAN, -INF, "1", None, False]),
    ("repetition_penalty", [0, -1.0, 1e-4, 1e4, NAN, INF, None, "x"]),
    ("presence_penalty", [-2.1, 2.1, NAN, INF, None]),
    ("frequency_penalty", [-2.1, 2.1, NAN, -INF, None]),
    ("min_tokens", [-1, 1.0, NAN, None, 2**31, True]),
    ("max_tokens", [0, -1, 1.0, NAN, 2**31, "3", True]),
    ("seed", [1.0, NAN, 2**64, -(2**63) - 1, "1", True]),
    ("logprobs", [-1, 1001, 1.0, NAN, True]),
    ("ignore_eos", [1, 0, None, "no"]),
    ("stop", [3, "", [""], [3], [None], None, b"x", {"a"}]),
    ("stop_token_ids", [3, "3", [-1], [1.0], ["3"], [True], [2**31], None]),
    ("logit_bias", [3, [1], {-1: 0.0}, {1.5: 0.0}, {"1": 0.0}, {1: NAN}, {1: 101}, {1: None}, {2**31: 0.0}]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in SAMPLING for value in values]
)
def test_sampling_values(field, value):
    with refused(InvalidRequest, f"^{field}=", "use|give|its"):
        SamplingParams(**{field: value})
    with refused(InvalidRequest, f"^{field}=", "use|give|its"):
        SamplingParams.from_dict({field: value})


def test_sampling_values_that_contradict_each_other():
    with refused(InvalidRequest, "min_tokens=5", "must not exceed max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_unknown_sampling_parameters():
    with refused(InvalidRequest, "temprature=1.0: unknown", "temperature, top_k"):
        SamplingParams.from_dict({"temprature": 1.0})
    with refused(InvalidRequest, r"sampling_params=\[1\]", "give a mapping"):
        SamplingParams.from_dict([1])


def test_numpy_values_are_numbers_like_any_other(usable):
    plain = SamplingParams(
        temperature=0.5,
        top_k=4,
        max_tokens=6,
        min_tokens=2,
        logprobs=2,
        logit_bias={4: 3.0},
        stop_token_ids=[4],
    )
    odd = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(4), max_tokens=np.int32(6), min_tokens=np.int8(2),
        logprobs=np.uint8(2), logit_bias={np.int64(4): np.float64(3)}, stop_token_ids=[np.int16(4)],
    )  # fmt: skip
    assert odd == plain and repr(odd) == repr(plain)
    one, other = (
        usable.engine.generate(prompt, p, n=n, seeds=seeds, request_ids=["x"])
        for prompt, p, n, seeds in (
            ([[2, 3]], plain, 2, [7]),
            (np.array([2, 3]), odd, np.int64(2), np.array([7])),
        )
    )
    assert one == other
    usable.check()


# --- building an engine -----------------------------------------------------------------------------------

OPTIONS = {
    "unknown name": ({"max_seqs": 3}, "max_seqs=3: unknown option", "max_num_seqs"),
    "unknown speculation name": (
        {"speculation": {"draftlength": 3}},
        "speculation.draftlength=3",
        "draft_length",
    ),
    "speculation as text": ({"speculation": "nf4"}, "speculation='nf4'", "give a mapping"),
    "wrong type": ({"max_num_seqs": "8"}, "max_num_seqs='8'", "type int"),
    "a bool for a number": ({"max_num_seqs": True}, "max_num_seqs=True", "type int"),
    "wrong type within": (
        {"speculation": {"draft_length": 2.0}},
        "speculation.draft_length=2.0",
        "type int",
    ),
    "unknown drafter": (
        {"speculation": {"drafter": "eagle"}},
        "speculation.drafter='eagle'",
        "use one of.*nf4",
    ),
    "max_model_len beyond the model": ({"max_model_len": 257}, "max_model_len=257", "limit is 256"),
    "max_model_len too short": ({"max_model_len": 1}, "max_model_len=1", ">= 2"),
    "no slots": ({"max_num_seqs": 0}, "max_num_seqs=0", ">= 1"),
    "cache too small": ({"kv_cache_tokens": 1}, "kv_cache_tokens=1", ">= 2"),
    "cache bytes too small": (
        {"kv_cache_bytes": 100},
        "kv_cache_bytes=100",
        "one block .* takes 8192 bytes",
    ),
    "cache larger than memory": ({"kv_cache_tokens": 10**15}, "kv_cache_tokens=10", "no memory.*lower"),
    "block size": ({"block_size": 48}, "block_size=48", "use 16, 32, 64 or 128"),
    "dtype": ({"dtype": "int8"}, "dtype='int8'", "use one of"),
    "float16 on CPU": ({"dtype": "float16", "device": "cpu"}, "dtype='float16'", "use bfloat16 or float32"),
    "device": ({"device": "tpu"}, "device='tpu'", "use auto, cpu"),
    "device number": ({"device": "cuda:first"}, "device='cuda:first'", "cuda:N"),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(model, case):
    options, *words = case
    with refused(InvalidRequest, *words):
        RolloutEngine.from_model(model, **({"dtype": "float32", "block_size": 16} | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_cuda_device(model, device):
    with refused(InvalidRequest, f"device='{device}'", "use cpu, or run rollout-spec doctor"):
        RolloutEngine.from_model(model, device=device)


def test_configs_that_are_no_mapping(model):
    for config in (5, ["dtype"], "engine.yaml"):
        with refused(InvalidRequest, "config=", "give an EngineConfig or a mapping"):
            RolloutEngine.from_model(model, config)


@pytest.mark.parametrize("kv_cache_tokens", [2, 16, 32, 48])
@pytest.mark.parametrize("max_model_len", [2, 20, None])
def test_the_smallest_caches_and_contexts_work(make_engine, kv_cache_tokens, max_model_len):
    """The probe at start must fit them, too."""
    engine = make_engine(kv_cache_tokens=kv_cache_tokens, max_model_len=max_model_len, max_num_seqs=2)
    blocks = -(-kv_cache_tokens // 16) * 16
    (completion,) = engine.generate([[5]], SamplingParams(ignore_eos=True))
    assert len(completion.token_ids) == min(blocks, max_model_len or 256) - 1


def test_a_model_that_is_none():
    with refused(WeightError, "config=None", "give the model's config"):
        RolloutEngine.from_model({})
    with refused(WeightError, "model=int", "give a transformers module or a state dict"):
        RolloutEngine.from_model(3)


def test_unsupported_models(model):
    config = model.config.to_dict()
    for changes, words in (
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ("GPT2LMHeadModel|gpt2",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"layer_types": ["sliding_attention"] * 2}, ("layer_types", "engine that supports it")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "0")),
    ):
        with refused(UnsupportedModel, *words):
            RolloutEngine.from_model(model.state_dict(), hf_config=config | changes)


def test_checkpoints(model, tmp_path):
    def load():
        options = {"speculation": {"drafter": "none"}, "dtype": "float32", "max_num_seqs": 2}
        return RolloutEngine.from_pretrained(tmp_path, **options)

    with refused(WeightError, "nowhere", "no such folder", "hf download"):
        RolloutEngine.from_pretrained(tmp_path / "nowhere")
    with refused(WeightError, "no config.json", "give a Hugging Face model folder"):
        load()
    model.save_pretrained(tmp_path)
    assert load().generate([GOOD], SamplingParams(max_tokens=2))
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, values = file.read_bytes(), json.loads(config.read_text())
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with refused(WeightError, "model.safetensors", "truncated or corrupt", "download the file again"):
            load()
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with refused(WeightError, "pytorch_model.bin", "refused", "save_pretrained"):
        load()
    file.write_bytes(whole)
    config.write_text(json.dumps(values | {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    with refused(UnsupportedModel, "mamba|Mamba"):
        load()
    config.write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with refused(WeightError, "11 of 35 tensors are missing", "model.layers.2", "send the complete model"):
        load()
    config.write_text(json.dumps(values | {"intermediate_size": 128}))
    with refused(WeightError, r"mlp.\w+_proj.weight", r"shape \(", "same model"):
        load()
    config.write_text(json.dumps(values))
    with refused(WeightError, "version='one'", "use an integer"):
        RolloutEngine.from_pretrained(tmp_path, version="one")
    assert load().generate([GOOD], SamplingParams(max_tokens=2))


# --- weight updates ---------------------------------------------------------------------------------------

NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def changed(weights, **changes):
    """The weights with some replaced (`__` for a dot), or left out (None)."""
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: t for name, t in (weights | changes).items() if t is not None}.items()


UPDATES = {
    "unknown name": (lambda w: changed(w, model__layers__9__mlp__up_proj__weight=torch.ones(2)), "layers.9", "close:"),
    "a LoRA tensor": (lambda w: changed(w, model__lora_A__weight=torch.ones(2)), "lora_A", "merge the LoRA adapter"),
    "wrong shape": (lambda w: changed(w, **{NORM: torch.ones(63)}), NORM, r"shape \(63,\)", "same model"),
    "wrong dtype": (lambda w: changed(w, **{NORM: torch.ones(64, dtype=torch.int64)}), NORM, "int64", "send float32"),
    "meta device": (lambda w: changed(w, **{NORM: torch.ones(64, device="meta")}), NORM, "meta", "materialise"),
    "missing at the end": (lambda w: changed(w, **{QUERY: None}), "1 of 24 tensors are missing", QUERY, "send the"),
    "nothing": (lambda w: [], "24 of 24 tensors are missing", "send the complete model"),
    "sent twice": (lambda w: [*w.items(), (NORM, w[NORM])], NORM, "received twice", "once"),
    "a state dict": (lambda w: w, "weights=", "pairs, such as model.named_parameters"),
    "names only": (list, "model.embed_tokens.weight", "pairs, such as model.named_parameters"),
    "a NumPy array": (lambda w: changed(w, **{NORM: np.ones(64)}), NORM, "pairs, such as"),
    "nothing to iterate": (lambda w: None, "weights=NoneType", "pairs, such as"),
    "another tied head": (lambda w: changed(w, lm_head__weight=torch.ones(VOCAB, 64)), "lm_head", "tie_word_embeddings"),
}  # fmt: skip


@pytest.fixture(scope="module")
def newer():
    return dict(make_model(7).named_parameters())


@pytest.mark.parametrize("case", UPDATES.values(), ids=UPDATES.keys())
def test_bad_updates_leave_the_old_policy_and_its_drafter(usable, newer, case):
    make, *words = case
    drafter = usable.engine.backend.weights.drafter
    linears = dict(drafter.linears)
    with refused(WeightError, *words):
        usable.engine.update_weights(make(newer))
    assert usable.engine.stats().version == drafter.version == 0
    assert drafter.linears == linears and not drafter._staged
    usable.check()


@pytest.mark.parametrize("version", [0, -1, 1.0, True, "1"])
def test_versions_that_do_not_follow(usable, newer, version):
    with refused(WeightError, f"version={version!r}", "larger than the version in force, 0"):
        usable.engine.update_weights(newer.items(), version=version)
    usable.check()


@pytest.mark.parametrize("error", [KeyError, RuntimeError, KeyboardInterrupt])
def test_a_sender_that_fails_midway(usable, newer, error):
    def send():
        for count, pair in enumerate(newer.items()):
            if count == 15:
                raise error("the trainer died")
            yield pair

    with pytest.raises(error, match="the trainer died"):
        usable.engine.update_weights(send())
    assert not usable.engine.backend.weights.drafter._staged
    usable.check()


def test_concurrent_updates_go_one_after_the_other(make_engine, newer, prompts):
    engine = make_engine(version=0)
    meeting = threading.Barrier(4)
    reports, errors = [], []

    def update(version):
        meeting.wait()
        try:
            reports.append(engine.update_weights(newer.items(), version))
        except WeightError as error:
            errors.append(str(error))

    for versions in ((None,) * 4, (10, 10, 10, 10)):
        threads = [threading.Thread(target=update, args=(version,)) for version in versions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(report.version for report in reports) == [1, 2, 3, 4, 10]
    assert len(errors) == 3 and all("version=10: use an integer larger" in error for error in errors)
    fresh = make_engine(make_model(7), version=10)
    one, other = (e.generate(prompts, PARAMS, request_ids=IDS) for e in (engine, fresh))
    assert [c.token_ids for c in one] == [c.token_ids for c in other]
    assert engine.stats().drafter == DRAFTER


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
@pytest.mark.parametrize("speculation", [DRAFTER, "none"])
def test_a_policy_of_nan_answers_and_a_good_update_recovers_fully(
    make_engine, prompts, verifier, speculation
):
    """Nothing of the NaN may stay behind: not in the cache, not in the sampler, not in the drafter."""
    speculation = {"drafter": speculation, "verifier": verifier}
    engine = make_engine(speculation=speculation)
    broken = {name: torch.full_like(t, math.nan) for name, t in make_model().named_parameters()}
    engine.generate(prompts, PARAMS)
    engine.update_weights(broken.items())
    for params in (
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=20, temperature=0),
        SamplingParams(max_tokens=20, top_k=3, top_p=0.5, min_p=0.1, logprobs=3),
        SamplingParams(max_tokens=20, repetition_penalty=1.2, min_tokens=4, logit_bias={3: 1.0}),
    ):
        for completion in engine.generate(prompts, params):
            assert 1 <= len(completion.token_ids) <= 20
            assert all(0 <= token < VOCAB for token in completion.token_ids)
            assert all(math.isnan(logprob) for logprob in completion.logprobs)
    engine.update_weights(make_model(3).named_parameters())
    fresh = make_engine(make_model(3), speculation=speculation, version=2)
    mine, theirs = (e.generate(prompts, PARAMS, request_ids=IDS) for e in (engine, fresh))
    assert mine == theirs
    assert all(math.isfinite(logprob) for completion in mine for logprob in completion.logprobs)
    assert engine.stats().drafter == fresh.stats().drafter
    assert engine.stats().kv_tokens_free == engine.stats().kv_tokens


def test_every_error_is_one_of_the_packages_own():
    assert all(
        issubclass(error, RolloutSpecError) for error in (InvalidRequest, UnsupportedModel, WeightError)
    )
    assert all(issubclass(error, ValueError) for error in (InvalidRequest, UnsupportedModel, WeightError))
