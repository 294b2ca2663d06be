"""What an operator runs besides rounds: schedule, status, reports, manual decisions."""
