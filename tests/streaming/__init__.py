"""Tests of ``streaming``."""
