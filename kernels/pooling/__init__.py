"""2-D max-pooling."""
