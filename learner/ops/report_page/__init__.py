"""A finished round as one HTML file, with the charts of the web page."""
