"""The commands `tdm-serve` and `tdm-keys`: arguments, checks before the start, start and end."""
