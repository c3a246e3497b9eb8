"""Data: Fashion-MNIST, image folders, tar shards and saved data sets; streaming and augmentation."""
