"""The command line: `program` reads it, and each `command_*` module is a subcommand."""

from fxprune.cli.program import main

__all__ = ["main"]
