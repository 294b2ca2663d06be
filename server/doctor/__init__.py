"""`server doctor`: what this machine and this set-up are, what is wrong with them, and what to do about it.

`readings` asks the machine, `machine_checks` and `setup_checks` judge what was read without asking anything themselves,
`examine` is the whole of it.
"""
