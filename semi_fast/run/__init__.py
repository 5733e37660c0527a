"""Everything a run keeps on disk."""
