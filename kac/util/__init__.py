"""Support code: files, options, errors, logging, fingerprints."""
