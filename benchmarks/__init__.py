"""Measure every number that the documentation states about cost. ``python -m benchmarks`` runs all benchmarks."""
