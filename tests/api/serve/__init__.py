"""Tests of ``api/serve``."""
