"""The routes: what each reads, does and answers, and the OpenAPI document that says so."""
