"""Files written whole or not at all."""

from data_prep.folder.writers import fsync_path, replacing, sha256_of

__all__ = ["fsync_path", "replacing", "sha256_of"]
