"""Everything a finished data folder is."""
