"""One run: its configuration, training loop, optimizer, checkpoint and environment."""
