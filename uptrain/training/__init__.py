"""Win back by a short training what a conversion lost."""
