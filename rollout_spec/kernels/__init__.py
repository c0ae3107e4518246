"""CPU kernels in C++, built on first use for the processor at hand; without a compiler the stock kernels remain."""
