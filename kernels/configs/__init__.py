"""Tables of measured configurations, ``<gpu>.json``, and how they are read, checked and overridden."""
