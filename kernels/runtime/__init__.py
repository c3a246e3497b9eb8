"""The base of all operations: launches and plans, backend choice, switches, PyTorch's protocols, argument checks."""
