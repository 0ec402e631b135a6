"""Serving: base models held in memory, which classify or write text with the stacks of finished jobs."""
