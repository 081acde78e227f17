"""How every command on stored studies reads its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from harness.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, as the whole harness does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; '{self.prog} --help' tells more")


def parser_for(command: str, *, description: str, examples: Sequence[str], epilog: str = "") -> Parser:
    """A parser with examples and the option that every command on stored studies has."""
    parser = Parser(
        prog=f"harness {command}",
        description=description,
        epilog="\n".join(["examples:", *(f"  {line}" for line in examples), epilog]).rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results"), metavar="DIR", help="where studies are (results)"
    )
    return parser
