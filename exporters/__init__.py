"""Targets: one file each, named after the target. Found by file name; see edgekd.protocols.Exporter."""
