"""Base checkpoints: where they come from, how they are read, streamed and merged."""
