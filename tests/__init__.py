"""The suite: ``tests/X`` mirrors the package ``X``. On a machine with a CUDA GPU it runs there, else in the interpreter."""
