"""Tests of ``forecast``."""
