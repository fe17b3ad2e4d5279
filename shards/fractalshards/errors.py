"""The exceptions that users see: their message is a single line saying what, where and what to do."""


class FractalError(Exception):
    """Something failed in a way the user can act on; commands print it as one line and exit with 1."""


class UsageError(FractalError):
    """A value was asked for that makes no sense; commands exit with 2."""


class WorkerLostError(FractalError):
    """The process that worked on a task was killed, several times over."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from a batch system; commands end as by Ctrl-C, but exit with 143."""


class StoppedError(FractalError):
    """Ctrl-C or SIGTERM came, and there is something to say of what was done by then; commands exit with ``code``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
