"""Which version is served: what follows the pointer, and the test of two versions on users."""
