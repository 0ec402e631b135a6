"""Memory budgets by arithmetic: the bytes that a turn or an evaluation needs. Integers only; no tensor is made."""
