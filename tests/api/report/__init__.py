"""Tests of ``api/report``."""
