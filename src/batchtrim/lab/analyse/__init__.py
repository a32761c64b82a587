"""Recorded runs into numbers: paired comparisons with intervals and tests, and claims judged by them."""
