"""The training loop, and what a run reads and writes."""
