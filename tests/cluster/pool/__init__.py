"""Tests of ``cluster/pool``."""
