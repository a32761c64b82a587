"""Turn recorded runs into verdicts: paired comparisons with intervals and tests, and claims judged by them."""
