"""What every front shares: services, access, limits, idempotency, addresses."""
