"""From recorded runs to verdicts: paired comparisons with intervals and tests, and claims judged by them."""
