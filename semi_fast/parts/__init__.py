"""What methods share: losses, running statistics."""
