"""The same engine over vLLM as released: the scheduler, the kernels and the parallelism are vLLM's."""
