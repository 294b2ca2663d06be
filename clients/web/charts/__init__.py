"""Charts as small SVGs, drawn by templates/chart.html.j2."""
