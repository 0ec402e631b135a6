"""Tests of ``aggregation``."""
