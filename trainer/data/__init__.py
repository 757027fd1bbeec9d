"""From files to batches: sources -> formats -> templates -> prepare -> batches. Imports run in that order only."""
