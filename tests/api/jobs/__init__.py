"""Tests of ``api/jobs``."""
