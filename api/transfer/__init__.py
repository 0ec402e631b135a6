"""Commands that bring files into a service and out of it."""
