"""Example job files, programs that prepare what some of them need, and rules of one's own in Python."""
