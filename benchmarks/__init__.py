"""Timings against PyTorch, and checks of the compiled kernels that need no GPU."""
