"""Picture and clip files, and their receipts."""
