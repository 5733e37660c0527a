"""Raw image collections -> a data folder of memory-mapped arrays, splits and a manifest."""
