"""Kinds of device (one .py each) and devices (one .toml each). See edgekd.protocols.Device."""
