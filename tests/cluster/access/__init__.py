"""Tests of ``cluster/access``."""
