"""Tests of ``cluster/jobs``."""
