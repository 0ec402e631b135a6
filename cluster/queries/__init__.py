"""What is asked of the tables, beside the record of jobs itself."""
