"""HTTP routes, schemas and request-body limits."""
