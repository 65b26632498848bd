"""Parts that HTTP and gRPC share: services, access, limits, idempotency, addresses."""
