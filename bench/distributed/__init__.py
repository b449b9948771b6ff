"""`python -m bench distributed`: attention over several GPUs."""
