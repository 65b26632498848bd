"""`tdm-bench profile` and `tdm-bench plan`: a simulation that runs the real scheduler over a table of costs."""
