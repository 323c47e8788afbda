"""Students made smaller: int8, mixed precision, pruning, and training that wins back the loss."""
