"""gRPC: services, edge and the front that listens."""
