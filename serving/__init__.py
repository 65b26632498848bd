"""The Ray Serve application: pictures over HTTP."""
