"""2-D convolution: general kernels, and those for what tensor descriptors can bring."""
