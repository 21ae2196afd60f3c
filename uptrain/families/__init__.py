"""What each architecture's tensors mean, as data."""
