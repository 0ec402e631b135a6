"""The job specification: the sections of its document, their defaults, and the rules between them."""
