"""YAN over HTTP, on Ray Serve."""

from serve.ingress import prefer_fast_path

prefer_fast_path()  # before anything here imports Serve
