"""Work that outlives its request: clips and batches, in a queue that outlives the server."""
