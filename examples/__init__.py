"""Job files, and what some of them need."""
