"""Tests of ``cluster/queries``."""
