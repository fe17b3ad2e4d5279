"""The command ``fractaltrain``, also as ``python -m fractaltrain``."""

from fractaltrain.beginning import ends_at_once


def main() -> None:
    """Run the command line; a signal that comes while it is imported ends it in one line."""
    with ends_at_once():
        from fractaltrain.cli import main as commands
    commands()


if __name__ == "__main__":
    main()
