"""Records of runs: what they hold, and who checks them."""
