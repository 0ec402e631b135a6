"""How good a stack is."""
