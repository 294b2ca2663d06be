"""The gate stage of a round: who judges which answers, and what is decided."""
