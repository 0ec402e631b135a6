"""Tests of ``api/operator``."""
