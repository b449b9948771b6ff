"""Measuring configs: in a child process with a watchdog, or from a recording.

`measurer` is the parent's side and `worker` the child's; `child` and `channel` are the pipes
between them. `gpu` has the arrays, events and flushes of the device, `representative` the
attention calls that stand for a problem class.
"""
