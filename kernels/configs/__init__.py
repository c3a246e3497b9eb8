"""Tables of measured configurations, ``<gpu>.json``, and the code that reads, checks and overrides them."""
