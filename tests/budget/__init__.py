"""Tests of ``budget``."""
