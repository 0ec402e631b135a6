"""Records as words, tables and pictures."""
