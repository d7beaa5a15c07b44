"""Charts of many runs, one idea a module: each takes a canvas and yields the figures it drew."""
