"""Studies: ablations, schedules, toolchains, the tuner against an exhaustive search."""
