"""The stages on Ray, the endpoint store, and tracking."""
