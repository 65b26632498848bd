"""The engine, which serves many requests on one thread, and the parts that it is made of."""
