"""Micro-benchmarks; their committed results are in results/."""
