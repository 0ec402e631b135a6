"""Tests of ``device``."""
