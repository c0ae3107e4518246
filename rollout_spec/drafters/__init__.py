"""Drafters propose tokens; one verifier decides."""
