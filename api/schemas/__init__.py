"""What requests and answers of the REST API hold, as Pydantic models. Nothing of the server is in them."""
