"""Jobs on a cluster: their records, and the actors that run them."""
