"""The kernels around attention over sequences that have lengths of their own.

schedule    lists of tiles, from lengths on the device
prepare     a list of tiles, new keys and values written into a cache, and q rotated
rotary      rows rotated by the angles of their positions
"""
