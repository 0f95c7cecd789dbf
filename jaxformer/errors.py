"""What a user sees when something of theirs is wrong: one message, one exit code, no traceback.

Every message says what is wrong, where, why, and what to try.
"""

from collections.abc import Iterable


def listed(names: Iterable[str], most: int = 50) -> str:
    """The first `most` of some names in quotes, since a name may hold control codes."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


class UserError(Exception):
    """A mistake or fault outside the program; `exit_code` is what every command exits with."""

    exit_code = 1


class ConfigError(UserError):
    """An option is misspelt, out of range, or does not fit the others."""

    exit_code = 2


class DataError(UserError):
    """An input file is missing, malformed, or does not fit the model."""

    exit_code = 3


class CheckpointError(UserError):
    """A run directory or checkpoint is damaged, in use, or of another model."""

    exit_code = 4


class NumericsError(UserError):
    """The loss stayed NaN or infinite."""

    exit_code = 5


class Stopped(UserError):
    """The run was asked to stop (SIGTERM, Ctrl-C); it saved its state and can be resumed."""

    exit_code = 75
