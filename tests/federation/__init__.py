"""Tests of ``federation``."""
