"""HTTP: routes, edges and the front that listens."""
