"""`DiffusionEngine`: many requests, one thread; what surrounds it."""
