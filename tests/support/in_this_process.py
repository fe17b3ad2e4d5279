"""``fractaltrain`` without a process of its own, which would spend seconds on importing PyTorch."""

from click.testing import CliRunner, Result

from fractaltrain.cli import main


def fractaltrain(arguments: str) -> Result:
    """Run the command line; words are parted by blanks."""
    return CliRunner().invoke(main, arguments.split())
