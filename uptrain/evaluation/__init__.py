"""What a model is worth: quality now, serving later."""
