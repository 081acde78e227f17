"""The one error type that a user of the harness can cause, and its exit codes.

HarnessError          what went wrong, in one line, and the exit code it ends with
└── UsageError        2: what was typed cannot work
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPARABLE = 3
EXIT_MISSING = 4
EXIT_INCONCLUSIVE = 5
EXIT_INTERRUPTED = 130


class HarnessError(Exception):
    """An error with a one-line message for the user; never shown with a traceback."""

    exit_code: int = EXIT_FAILED


class UsageError(HarnessError):
    """What the user typed cannot work: the message names the value, the rule and the mend."""

    exit_code = EXIT_USAGE
