"""What the method needs besides PyTorch: files, options, errors, fingerprints."""
