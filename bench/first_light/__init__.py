"""`python -m bench first-light`: the first minutes on a GPU, in order of worth, in one call."""
