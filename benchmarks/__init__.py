"""Benchmarks of fused-gopd: ``python -m benchmarks`` runs them, ``python benchmarks/report.py`` prints the tables."""
