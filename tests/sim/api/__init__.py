"""The public functions end to end in the simulator."""
