"""The version of derc."""

VERSION = "0.1.0"
