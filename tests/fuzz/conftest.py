"""Set the number of examples: 60 a test by default, or as many as BATCHTRIM_FUZZ says."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("BATCHTRIM_FUZZ", "60")),
    derandomize="BATCHTRIM_FUZZ" not in os.environ,  # the tests repeat; `make fuzz` looks for what is new
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    print_blob=True,
)
