"""``python -m edgekd``, which ``torchrun`` and ``accelerate launch`` start with ``-m``."""

from edgekd.cli.app import main

if __name__ == "__main__":
    main()
