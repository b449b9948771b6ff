"""What a page says, as numbers: one module for each section, and no markup."""
