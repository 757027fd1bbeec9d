"""Train the trials of a sweep together on one base, each exactly as it would be trained alone."""
