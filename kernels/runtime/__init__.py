"""What all operations stand on: launches, the choice of a backend, switches, PyTorch's protocols, argument checks."""
