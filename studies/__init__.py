"""What makes the evidence of `records/`: studies of methods and of the keep log. `benchmarks/` measures cost alone."""
