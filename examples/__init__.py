"""Example job files, and a script that makes the model and the rows of one of them."""
