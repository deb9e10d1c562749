"""Benchmarks: one file a claim. Each runs Brook and its peer in one run and says what it ran on."""
