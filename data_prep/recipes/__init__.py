"""Which rows make a data set: catalog, splits, orders."""
