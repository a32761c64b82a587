"""Produce the evidence in `records/`: studies of methods, engines and keep log. `benchmarks/` measures cost only."""
