"""Several processes: launch, exchange of tensors, synchronized BatchNorm."""
