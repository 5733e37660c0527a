"""Where images come from: one module a collection, each giving a `Source`."""
