"""Makes pictures for fronts and jobs, with an engine in this process or in others."""
