"""The REST API: routes, resources and errors."""
