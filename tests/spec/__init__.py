"""Tests of ``spec``."""
