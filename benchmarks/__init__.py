"""The commands that measure every published figure: ``python -m benchmarks``."""
