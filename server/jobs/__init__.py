"""A request's life after validation: generation, and durable jobs with their store."""
