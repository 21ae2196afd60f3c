"""A folder of tensors, in and out."""
