"""YAN over HTTP, on Ray Serve."""
