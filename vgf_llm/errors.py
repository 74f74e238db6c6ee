"""The errors that are the user's to mend: each names the file, row, column or key, the value seen and what to do.

The command line prints their message without a traceback and ends with exit code 2.
"""


class VGFError(Exception):
    """Base of every error whose cause is an input and not a fault of the program."""


class ConfigError(VGFError):
    """A recipe or flag is unknown, has the wrong type or a value out of range."""


class DataError(VGFError):
    """A data file is missing, malformed or does not hold what the command needs."""


class ModelError(VGFError):
    """A model or tokenizer cannot be loaded or does not fit the other one it is used with."""


class CheckpointError(VGFError):
    """A training checkpoint is incomplete or was changed since it was written."""


class OutputError(VGFError):
    """An output folder or file cannot be written."""


class DivergedError(VGFError):
    """A loss or gradient of training became infinite or NaN."""


class SyncError(VGFError):
    """An engine that training samples from does not run the weights that are trained."""


class NonFiniteError(VGFError):
    """A value or gradient became infinite or NaN during the flow.

    Attributes:
        group: index of the prompt in the batch.
        step: flow step at which it happened (0 is the first).
    """

    def __init__(self, message: str, group: int, step: int) -> None:
        """Keep the position beside the message."""
        super().__init__(message)
        self.group = group
        self.step = step

    def __reduce__(self) -> tuple[type["NonFiniteError"], tuple[str, int, int]]:
        """Survive pickling (worker processes hand errors back)."""
        return NonFiniteError, (str(self), self.group, self.step)
