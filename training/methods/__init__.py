"""One file a method: pure functions that turn a part of a batch into a loss."""
