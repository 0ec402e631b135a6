"""Tests of ``api/rest``."""
