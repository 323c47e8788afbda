"""How to measure: blocks, statistics, the report."""
