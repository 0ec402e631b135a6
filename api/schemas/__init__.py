"""What requests and answers of the REST API hold. A file is named as that with their routes, and has nothing of the server."""
