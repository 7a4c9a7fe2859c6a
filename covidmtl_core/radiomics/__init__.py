"""High-throughput lung features (paper section 4.1)."""
