"""Jobs on a cluster: the database that records them, and the actors that run them."""
