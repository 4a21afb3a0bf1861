"""Conformance checks that first-party and third-party plugins run alike, and what tests of a
plugin need: small random checkpoints, and fresh environments to install it into."""

from lorakit.testing.checkpoints import write_checkpoint

__all__ = ["write_checkpoint"]
