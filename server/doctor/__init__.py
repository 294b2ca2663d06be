"""`server doctor`: reports on this machine and setup, what is wrong with them, and what to do about it.

`readings` reads the machine, `machine_checks` and `setup_checks` judge the readings without reading anything
themselves, and `examine` combines them.
"""
