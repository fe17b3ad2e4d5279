"""The one exception that users see: its message is a single line saying what, where and what to do."""


class FractalError(Exception):
    """Something failed in a way the user can act on; commands print it as one line and exit with 1."""


class UsageError(FractalError):
    """A value was asked for that makes no sense; commands exit with 2."""
