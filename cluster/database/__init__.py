"""The database of the service: connections, and tables."""
