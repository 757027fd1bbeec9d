"""`afina doctor`: can this machine, or this allocation, run a job; which method goes with what. Loads no torch."""
