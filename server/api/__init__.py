"""The wire: routes, bodies, event streams, the OpenAPI document and the outermost middleware."""
