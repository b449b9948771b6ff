"""What everything stands on: arrays, devices, the driver, files, switches, errors."""
