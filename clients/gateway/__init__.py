"""The gateway: OpenAI's HTTP API for clients that speak it. It is a client of the server, as the page is."""
