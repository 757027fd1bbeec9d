"""How a job is started: `torchrun` on this machine, a sweep of many runs. Training itself knows nothing of this."""
