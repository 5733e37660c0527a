"""Training of class-imbalanced semi-supervised image classifiers."""
