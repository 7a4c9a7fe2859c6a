"""The importable core of the COVID-MTL book: data, claims, statistics, and what a chapter needs.

Importing the package imports none of its heavy dependencies; each module imports what it uses.
"""

import warnings

__version__ = "0.2.0"

# joblib replaces a worker process that holds more memory after a scan than before its first one,
# which is no news to a user: no work is lost, and the results are the same.
warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the exec")
