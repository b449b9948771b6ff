"""Times, right results and the processes that measure them."""
