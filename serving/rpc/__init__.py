"""gRPC: the listening server, its edge and its services."""
