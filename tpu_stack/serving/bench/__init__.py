"""Load on an engine, measured: what is asked, when, and how long the answers take."""
