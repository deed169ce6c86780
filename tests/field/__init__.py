"""What people who make models smaller ran into, in public reports, as small cases; a test names the reports it is from.

A module holds the cases of one kind of fault, not of one report: a new instance of a kind is one more case there.
"""
