"""edgekd: from a PyTorch teacher to a proven student on the device."""

__version__ = "0.1.0"
