"""`python -m medbridge.cli`, which torchrun starts."""

from medbridge.cli import main

if __name__ == "__main__":
    main()
