"""The commands `tdm-serve` and `tdm-keys`: arguments, checks, start and stop."""
