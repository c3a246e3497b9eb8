"""2-D convolution: general kernels, and kernels that load through tensor descriptors."""
