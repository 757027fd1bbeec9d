"""Slurm: write the batch script, submit it, decide at its end whether the job goes back into the queue."""
