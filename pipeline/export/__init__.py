"""Exports models to formats that other software loads without this project."""
