"""`python -m clients.demo`."""

from clients.demo.command import app

app()
