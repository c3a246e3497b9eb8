"""Images and labels: Fashion-MNIST, folders of images, and what is changed in them at random."""
