"""Benchmarks: cases registered once, timed after their correctness check, kept as CSV rows."""
