"""Pictures for fronts and jobs: an engine in this process, or engines of other processes."""
