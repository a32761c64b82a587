"""Many runs: from a grid of settings to recorded rows, in one process, in several, or on a Ray cluster."""
