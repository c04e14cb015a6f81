"""The command line: the only room that knows it. Nothing heavy is imported before a command needs it."""

from peer_jax.cli import runs, sweeps, analysing, measure, compiling, launch  # noqa: F401, I001, in the order of --help
from peer_jax.cli.app import app
from peer_jax.cli.outcome import main

__all__ = ["app", "main"]
