"""Models as programs (``torch.export``): made, read, rewritten."""
