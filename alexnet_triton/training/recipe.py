"""What decides a run's numbers."""

#: d2l's learning rates.
LEARNING_RATE = {"alexnet": 0.01, "lenet": 0.9}
