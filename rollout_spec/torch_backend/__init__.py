"""The PyTorch backend: paged KV cache, scheduler and runner, on CPU or one CUDA device."""
