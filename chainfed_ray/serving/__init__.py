"""Finished stacks, held in memory to answer."""
