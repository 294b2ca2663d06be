"""Which version is served: following the pointer, and the A/B test of two versions on users."""
