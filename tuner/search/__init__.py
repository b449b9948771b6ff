"""The search: proposals, studies and their storage, processes that compile."""
