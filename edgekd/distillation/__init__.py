"""Students that learn from a teacher cache: losses, the training loop, every arm."""
