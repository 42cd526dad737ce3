"""Ray: the connection to a cluster, its resources, and checks before work begins."""
