"""Where stored pixels come from."""
