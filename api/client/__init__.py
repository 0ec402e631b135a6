"""The service as its users' programs see it: a Python object that calls the REST API."""
