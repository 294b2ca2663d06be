"""What the page and the gateway decide alike about a request."""
