"""The command ``fractalshards`` as ``python -m fractalshards``."""

from fractalshards.cli import main

if __name__ == "__main__":
    main()
