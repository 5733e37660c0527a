"""A build while it runs."""
