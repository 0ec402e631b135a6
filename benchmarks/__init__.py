"""Every figure that is published has a command here: ``python -m benchmarks``."""
