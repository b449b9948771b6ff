"""The room below all others: arrays, devices, the driver, files, switches, errors."""
