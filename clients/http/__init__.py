"""The process that serves HTTP: the page, the gateway or both."""
