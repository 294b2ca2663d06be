"""What an operator runs beside rounds: schedule, status, reports, decisions by hand."""
