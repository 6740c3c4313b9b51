"""Measurements of RMSNorm: `python -m benchmarks --help`, and README.md in this folder."""
