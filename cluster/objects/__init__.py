"""Objects in S3 or a store like it, where the service keeps its data if it has no folder that its machines share."""
