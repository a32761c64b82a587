"""Studies of methods and of the keep log, which make the evidence in `records/`. `benchmarks/` measures cost only."""
