"""Tokens of clients and signing keys of the service."""
