"""llama.cpp's bf16 decoding of a checkpoint of ours, for `rollout-spec bench kernels --llama-python`.

Runs in an environment of its own, with `llama-cpp-python`, `gguf` and `numpy`: `python llama_decode.py CHECKPOINT GGUF
THREADS`. Converts the checkpoint (Qwen3, bf16) unless GGUF exists, then reads lines `CONTEXT ROWS PASSES` and answers
each with the seconds of PASSES decodes of ROWS tokens behind CONTEXT tokens, without sampling.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(path: Path):
    """(name, float32 array) of a safetensors file in bfloat16."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", (name, entry["dtype"])
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[start:stop], np.uint16).astype(np.uint32) << 16
            yield name, values.view(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OTHERS:
        return f"{OTHERS[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.weight"


def convert(checkpoint: Path, out: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, array in tensors(checkpoint / "model.safetensors"):
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(checkpoint: Path, out: Path, threads: int) -> None:
    import llama_cpp

    if not out.exists():
        scratch = out.with_suffix(".part")
        convert(checkpoint, scratch)
        scratch.rename(out)

    @llama_cpp.llama_log_callback
    def quiet(level, text, data):
        if level == 4:  # errors
            sys.stderr.write(text.decode())

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(out).encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 1024, threads, threads
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    random = np.random.default_rng(0)

    def decode(tokens) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*map(int, tokens))
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        assert llama_cpp.llama_decode(context, batch) == 0

    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        length, rows, passes = map(int, line.split())
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, True)
        decode(random.integers(0, vocabulary, length))
        start = time.perf_counter()
        for _ in range(passes):
            decode(random.integers(0, vocabulary, rows))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
