"""geoopt, imported without its warnings: importing it scripts functions, which torch warns about."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import geoopt

__all__ = ["geoopt"]
