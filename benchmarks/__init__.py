"""Timings against PyTorch, and what can be known of the kernels without a GPU."""
