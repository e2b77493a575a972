"""YAN over HTTP, on Ray Serve."""

from serve.ingress import prefer_haproxy

prefer_haproxy()  # before anything here imports Serve
