"""Every number the documentation states about cost. ``python -m benchmarks`` runs all of them."""
