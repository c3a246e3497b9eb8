"""The command line ``alexnet-triton``."""
