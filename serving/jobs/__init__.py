"""Jobs: clips and batches, which outlive their request, in a queue that outlives the server."""
