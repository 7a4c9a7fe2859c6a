"""The importable core of the COVID-MTL book: data, claims, statistics, and what a chapter needs.

Importing the package imports none of its heavy dependencies; each module imports what it uses.
"""

__version__ = "0.1.0"
