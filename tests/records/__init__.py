"""Tests of ``records``."""
