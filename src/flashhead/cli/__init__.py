"""The command line: argparse, one file a subcommand; torch is imported once there is work to do."""

from flashhead.cli.main import main

__all__ = ["main"]
