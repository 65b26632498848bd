"""HTTP: the listening server, its edge and its routes."""
