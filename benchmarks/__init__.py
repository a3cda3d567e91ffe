"""Benchmarks of fused-gopd: ``python -m benchmarks`` runs them, ``python -m benchmarks.report`` prints the tables."""
