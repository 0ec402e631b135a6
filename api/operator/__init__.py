"""The operator's commands: they act on the database of a service, at its machine, and not over its API."""
